-- redispatch: publish the message of a waiting job that is due (judge.lua says which need it). `copy` is the number of
-- this message among those of its attempt. Claiming is a compare-and-set: a copy too many runs nothing.
-- ARGS attempt copy dispatch_after_ms max_after_ms
-- DISPATCHES
-- REPLIES OK | NOT_DUE | NOT_FOUND

local status, current, copies, dispatched =
  unpack(redis.call('HMGET', JOB, 'status', 'attempt', 'copies', 'dispatched'))
if not status then
  redis.call('ZREM', WAITING, id) -- the record was deleted by hand
  return {'NOT_FOUND'}
end
local due = redis.call('ZSCORE', WAITING, id)
local is_first = dispatched == ''
local expected = text(tonumber(copies or '0') + (is_first and 0 or 1))
if not is_waiting(status) or current ~= attempt or copy ~= expected or not due or tonumber(due) > now then
  return {'NOT_DUE'}
end
dispatch(FIRST_COMMAND)
-- A first message that is not sent in this step stays in the outbox until the broker confirmed it.
redis.call('HSET', JOB, 'copies', copy, 'dispatched', is_first and dispatch_time(FIRST_COMMAND) or text(now))
if status == 'Scheduled' then
  change('Queued')
end
local after = math.min(tonumber(dispatch_after_ms) * 2 ^ math.min(tonumber(copy), 40), tonumber(max_after_ms))
redis.call('ZADD', WAITING, text(now + after), id)
return {'OK'}
