-- submit: store a job and hand its Celery message to the broker, or answer with the job that has this id already.
-- ARGS name owner fingerprint nonce max_retries retention_ms queue_limit request delay_ms dispatch_after_ms
-- DISPATCHES
-- REPLIES SUBMITTED now | REPLAYED record | CONFLICT | FULL waiting

local known = redis.call('HMGET', JOB, 'name', 'owner', 'fingerprint', 'nonce')
if known[1] then
  if known[4] == nonce then
    return {'SUBMITTED', redis.call('HGET', JOB, 'created')} -- the client library sent it twice
  end
  if known[1] == name and (known[2] or '') == owner and known[3] == fingerprint then
    return {'REPLAYED', redis.call('HGETALL', JOB)}
  end
  return {'CONFLICT'}
end

if queue_limit ~= '' then
  local waiting = redis.call('ZCARD', WAITING)
  if waiting >= tonumber(queue_limit) then
    return {'FULL', waiting}
  end
end

-- First, for it is the one command that can fail (a key of another type): then nothing is stored either.
dispatch(FIRST_COMMAND)
local delay = tonumber(delay_ms)
redis.call('HSET', JOB, 'name', name, 'created', text(now), 'attempt', '1', 'fence', '0', 'retries', '0',
  'max_retries', max_retries, 'retention', retention_ms, 'fingerprint', fingerprint, 'nonce', nonce)
if owner ~= '' then
  redis.call('HSET', JOB, 'owner', owner)
end
redis.call('SET', REQUEST, request)
redis.call('ZADD', JOBS, text(now), id)
wait(delay > 0 and 'Scheduled' or 'Queued', now + delay + tonumber(dispatch_after_ms), dispatch_time(FIRST_COMMAND, delay))
return {'SUBMITTED', text(now)}
