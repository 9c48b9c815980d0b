-- cancel: somebody wants the job stopped. A waiting job is Canceled at once, a running one is told.
-- ARGS nonce
-- REPLIES CANCELED | CANCELING | OVER status | NOT_FOUND

local status, canceling, asked = unpack(redis.call('HMGET', JOB, 'status', 'cancel', 'nonce'))
if not status then
  return {'NOT_FOUND'}
end
if status == 'Canceled' and asked == nonce then
  return {'CANCELED'} -- already done by you
end
if is_waiting(status) then
  finish('Canceled', 'nonce', nonce)
  return {'CANCELED'}
end
if status ~= 'InProgress' then
  return {'OVER', status}
end
if not canceling then
  change('InProgress', 'cancel', '1')
end
return {'CANCELING'}
