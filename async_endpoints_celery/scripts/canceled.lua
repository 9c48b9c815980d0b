-- canceled: the runner stopped because it was asked to.
-- ARGS fence
-- REPLIES OK | NOT_YOURS status | NOT_FOUND

local status, current = unpack(redis.call('HMGET', JOB, 'status', 'fence'))
if not status then
  return {'NOT_FOUND'}
end
if current == fence and status == 'Canceled' then
  return {'OK'} -- already done by you
end
if status ~= 'InProgress' or current ~= fence then
  return {'NOT_YOURS', status}
end
finish('Canceled')
return {'OK'}
