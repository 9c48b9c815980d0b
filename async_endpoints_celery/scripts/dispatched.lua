-- dispatched: the broker confirmed the message of this attempt, so its outbox entry is cleared: the sweep need not
-- publish it again soon.
-- ARGS attempt dispatch_after_ms
-- REPLIES OK | NOT_WAITING

local status, current, dispatches = unpack(redis.call('HMGET', JOB, 'status', 'attempt', 'dispatches'))
if not is_waiting(status) or current ~= attempt or dispatches ~= '0' then
  return {'NOT_WAITING'}
end
redis.call('ZADD', WAITING, 'XX', text(now + tonumber(dispatch_after_ms)), id)
return {'OK'}
