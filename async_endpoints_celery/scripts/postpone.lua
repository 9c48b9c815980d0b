-- postpone: the sweep looks at a waiting job again later, for its message could not be built.
-- KEYS 1 waiting zset
-- ARGV 1 id, 2 delay_ms
-- REPLIES number of members added: always 0, for only a score changes

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local due = string.format('%.0f', now + tonumber(ARGV[2]))
return redis.call('ZADD', KEYS[1], 'XX', due, ARGV[1])
