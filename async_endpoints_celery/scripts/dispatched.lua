-- dispatched: the broker confirmed the message of this attempt, so its outbox entry is cleared: the sweep need not
-- publish it.
-- ARGS attempt delay_ms dispatch_after_ms
-- REPLIES OK | NOT_WAITING

local status, current, dispatched = unpack(redis.call('HMGET', JOB, 'status', 'attempt', 'dispatched'))
if not status or not is_waiting(status) or current ~= attempt or dispatched ~= '' then
  return {'NOT_WAITING'}
end
redis.call('HSET', JOB, 'dispatched', text(now + tonumber(delay_ms)))
redis.call('ZADD', WAITING, 'XX', text(now + tonumber(delay_ms) + tonumber(dispatch_after_ms)), id)
return {'OK'}
