-- recover: the worker of a running job is gone. By the sweep (runner ''), once the lease has ended; by the worker
-- itself, when it saw the pool process of this runner die. It costs a retry, and without one left the job has failed.
-- `returns` is 1 when the message goes back to its queue by itself.
-- ARGS runner returns recovery_limit lost_failure overdue_failure dispatch_after_ms
-- DISPATCHES
-- REPLIES QUEUED | FAILED | CANCELED | NOT_LOST | NOT_FOUND

local status, holder, deadline, canceling, retries, limit =
  unpack(redis.call('HMGET', JOB, 'status', 'runner', 'deadline', 'cancel', 'retries', 'max_retries'))
if not status then
  redis.call('ZREM', RUNNING, id) -- the record was deleted by hand
  return {'NOT_FOUND'}
end
local lease = redis.call('ZSCORE', RUNNING, id)
local expired = lease and tonumber(lease) <= now
if status ~= 'InProgress' or not (holder == runner or (runner == '' and expired)) then
  return {'NOT_LOST'}
end
if tonumber(retries) < math.min(tonumber(limit), tonumber(recovery_limit)) and not canceling then
  dispatch(FIRST_COMMAND)
end
-- Whatever the old runner still sends is refused from here on.
redis.call('HINCRBY', JOB, 'fence', 1)
if canceling then
  finish('Canceled')
  return {'CANCELED'}
end
local failure = tonumber(deadline) <= now and overdue_failure or lost_failure
if tonumber(retries) >= math.min(tonumber(limit), tonumber(recovery_limit)) then
  finish('Failed', 'error', failure)
  return {'FAILED'}
end
redis.call('HINCRBY', JOB, 'retries', 1)
-- When the worker itself tells, the message goes back to its queue without a command of ours.
wait('Queued', now + tonumber(dispatch_after_ms), returns == '1' and text(now) or dispatch_time(FIRST_COMMAND),
  'error', failure)
return {'QUEUED'}
