-- redispatch: the sweep publishes the message of a waiting job that is due. The copies back off, doubling, so that a
-- deep queue is not flooded with them; claiming is a compare-and-set, so a copy too many runs nothing.
-- ARGS attempt dispatch_after_ms max_after_ms
-- DISPATCHES
-- REPLIES OK dispatches | NOT_DUE | NOT_FOUND

local status, current, dispatches = unpack(redis.call('HMGET', JOB, 'status', 'attempt', 'dispatches'))
if not status then
  redis.call('ZREM', WAITING, id) -- the record was deleted by hand
  return {'NOT_FOUND'}
end
local due = redis.call('ZSCORE', WAITING, id)
if not is_waiting(status) or current ~= attempt or not due or tonumber(due) > now then
  return {'NOT_DUE'}
end
local count = tonumber(dispatches or '0')
local after = math.min(tonumber(dispatch_after_ms) * 2 ^ math.min(count, 40), tonumber(max_after_ms))
redis.call('HSET', JOB, 'dispatches', text(count + 1))
if status == 'Scheduled' then
  change('Queued')
end
redis.call('ZADD', WAITING, text(now + after), id)
dispatch(FIRST_COMMAND)
return {'OK', count + 1}
