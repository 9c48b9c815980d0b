-- due: what the sweep has to do now, a batch of each: dispatch waiting jobs, recover running ones.
-- KEYS 1 waiting zset, 2 running zset, 3 sweep hash
-- ARGV 1 batch
-- REPLIES ids of waiting jobs that are due, ids of running jobs whose lease ended, milliseconds since the last sweep

local clock = redis.call('TIME')
local now = string.format('%.0f', tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000))
local last_run = redis.call('HGET', KEYS[3], 'last_run') or '0'
return {
  redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1]),
  redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, ARGV[1]),
  string.format('%.0f', tonumber(now) - tonumber(last_run)),
}
