-- retry: somebody wants a Failed or Canceled job run again, from its first attempt on. The fence keeps rising.
-- ARGS attempt nonce dispatch_after_ms
-- DISPATCHES
-- REPLIES OK | NOT_OVER status | GONE | NOT_FOUND

local status, current, asked = unpack(redis.call('HMGET', JOB, 'status', 'attempt', 'nonce'))
if not status then
  return {'NOT_FOUND'}
end
if asked == nonce then
  return {'OK'} -- already done by you
end
if (status ~= 'Failed' and status ~= 'Canceled') or current ~= attempt then
  return {'NOT_OVER', status}
end
if redis.call('EXISTS', REQUEST) == 0 then
  return {'GONE'}
end
dispatch(FIRST_COMMAND)
redis.call('PERSIST', JOB)
redis.call('PERSIST', REQUEST)
redis.call('ZREM', ENDED, id)
redis.call('HDEL', JOB, 'completed', 'error', 'result', 'progress')
redis.call('HINCRBY', JOB, 'attempt', 1)
wait('Queued', now + tonumber(dispatch_after_ms), dispatch_time(FIRST_COMMAND), 'retries', '0',
  'nonce', nonce)
return {'OK'}
