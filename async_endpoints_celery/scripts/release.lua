-- release: the runner gives its job back unfinished (a worker shutting down). It costs no retry.
-- ARGS fence dispatch_after_ms
-- DISPATCHES
-- REPLIES OK | NOT_YOURS status | NOT_FOUND

local status, current, canceling = unpack(redis.call('HMGET', JOB, 'status', 'fence', 'cancel'))
if not status then
  return {'NOT_FOUND'}
end
if current == fence and is_waiting(status) then
  return {'OK'} -- already done by you
end
if status ~= 'InProgress' or current ~= fence then
  return {'NOT_YOURS', status}
end
if canceling then
  finish('Canceled')
  return {'OK'}
end
wait('Queued', now + tonumber(dispatch_after_ms))
dispatch(FIRST_COMMAND)
return {'OK'}
