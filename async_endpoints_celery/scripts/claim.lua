-- claim: a worker takes a waiting job and becomes its only runner. The fence it gets must be shown with every write.
-- `copy` is the number of the message among those of this attempt: 0 for the first.
-- ARGS attempt copy runner worker lease_ms timeout_ms grace_ms max_retries retention_ms
-- REPLIES CLAIMED fence retries max_retries owner | NOT_WAITING status | NOT_FOUND

local status, current, owner_of, limit, retries, fence, holder =
  unpack(redis.call('HMGET', JOB, 'status', 'attempt', 'owner', 'max_retries', 'retries', 'fence', 'runner'))
if not status then
  return {'NOT_FOUND'}
end
if status == 'InProgress' and holder == runner then
  return {'CLAIMED', fence, retries, limit, owner_of or ''} -- already yours
end
if not is_waiting(status) or current ~= attempt then
  return {'NOT_WAITING', status}
end

-- The worker knows the handler; a web process that mapped it by name only does not.
if max_retries ~= '' then
  limit = max_retries
end
local deadline = now + tonumber(timeout_ms)
fence = text(redis.call('HINCRBY', JOB, 'fence', 1))
change('InProgress', 'started', text(now), 'runner', runner, 'worker', worker, 'deadline', text(deadline),
  'max_retries', limit)
if retention_ms ~= '' then
  redis.call('HSET', JOB, 'retention', retention_ms)
end
-- How far the queue is: whatever was dispatched before this message and still waits has been overtaken. Of several
-- messages only the newest one's time is known; an older one tells nothing.
local name, copies, dispatched = unpack(redis.call('HMGET', JOB, 'name', 'copies', 'dispatched'))
redis.call('HSET', CLAIMED, name .. '|at', text(now))
if copy == copies and dispatched ~= '' then
  local reached = tonumber(redis.call('HGET', CLAIMED, name) or '0')
  redis.call('HSET', CLAIMED, name, text(math.max(reached, tonumber(dispatched))))
end
redis.call('HDEL', JOB, 'copies', 'dispatched')
redis.call('ZREM', WAITING, id)
redis.call('ZADD', RUNNING, text(math.min(now + tonumber(lease_ms), deadline + tonumber(grace_ms))), id)
return {'CLAIMED', fence, retries, limit, owner_of or ''}
