-- cancel: somebody wants the job stopped. A waiting job is Canceled at once, a running one is told.
-- ARGS
-- REPLIES CANCELED | CANCELING | OVER status | NOT_FOUND

local status, canceling = unpack(redis.call('HMGET', JOB, 'status', 'cancel'))
if not status then
  return {'NOT_FOUND'}
end
if is_waiting(status) then
  finish('Canceled')
  return {'CANCELED'}
end
if status ~= 'InProgress' then
  return {'OVER', status}
end
if not canceling then
  change('InProgress', 'cancel', '1')
end
return {'CANCELING'}
