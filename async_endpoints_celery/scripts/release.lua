-- release: the worker gives a job back unfinished, for it is shutting down. It costs no retry, and the message goes back
-- to its queue by itself.
-- ARGS runner dispatch_after_ms
-- REPLIES OK | NOT_YOURS status | NOT_FOUND

local status, holder, canceling = unpack(redis.call('HMGET', JOB, 'status', 'runner', 'cancel'))
if not status then
  return {'NOT_FOUND'}
end
if status ~= 'InProgress' or holder ~= runner then
  return {'NOT_YOURS', status}
end
-- Whatever the stopped runner still sends is refused from here on.
redis.call('HINCRBY', JOB, 'fence', 1)
if canceling then
  finish('Canceled')
else
  wait('Queued', now + tonumber(dispatch_after_ms), text(now))
end
return {'OK'}
