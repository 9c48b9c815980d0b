-- prune: forget a batch of jobs past their retention. Their records have expired by themselves.
-- KEYS 1 ended zset, 2 jobs zset, 3 sweep hash
-- ARGV 1 batch
-- REPLIES number of jobs forgotten

local clock = redis.call('TIME')
local now = string.format('%.0f', tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000))
local ids = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])
if #ids > 0 then
  redis.call('ZREM', KEYS[1], unpack(ids))
  redis.call('ZREM', KEYS[2], unpack(ids))
end
redis.call('HSET', KEYS[3], 'last_run', now)
return #ids
