-- complete: the runner's handler returned. Completed never changes again.
-- ARGS fence result
-- REPLIES OK | NOT_YOURS status | NOT_FOUND

local status, current = unpack(redis.call('HMGET', JOB, 'status', 'fence'))
if not status then
  return {'NOT_FOUND'}
end
if current == fence and status == 'Completed' then
  return {'OK'} -- already done by you
end
if status ~= 'InProgress' or current ~= fence then
  return {'NOT_YOURS', status}
end
finish('Completed', 'result', result)
redis.call('HDEL', JOB, 'error')
return {'OK'}
