-- reschedule: the runner's attempt failed and another one follows after a delay; the error stays on the record.
-- ARGS fence failure delay_ms dispatch_after_ms
-- DISPATCHES
-- REPLIES OK | NOT_YOURS status | NOT_FOUND

local status, current = unpack(redis.call('HMGET', JOB, 'status', 'fence'))
if not status then
  return {'NOT_FOUND'}
end
if current == fence and status == 'Scheduled' then
  return {'OK'} -- already done by you
end
if status ~= 'InProgress' or current ~= fence then
  return {'NOT_YOURS', status}
end
dispatch(FIRST_COMMAND)
redis.call('HINCRBY', JOB, 'attempt', 1)
redis.call('HINCRBY', JOB, 'retries', 1)
local delay = tonumber(delay_ms)
wait('Scheduled', now + delay + tonumber(dispatch_after_ms), dispatch_time(FIRST_COMMAND, delay), 'error', failure)
return {'OK'}
