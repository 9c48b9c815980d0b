-- progress: the runner reports how far it is, and hears whether somebody wants the job canceled.
-- ARGS fence progress
-- REPLIES OK canceling | NOT_YOURS status | NOT_FOUND

local status, current, canceling = unpack(redis.call('HMGET', JOB, 'status', 'fence', 'cancel'))
if not status then
  return {'NOT_FOUND'}
end
if status ~= 'InProgress' or current ~= fence then
  return {'NOT_YOURS', status}
end
change('InProgress', 'progress', progress)
return {'OK', canceling or ''}
