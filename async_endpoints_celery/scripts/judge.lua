-- judge: the sweep looks at waiting jobs that are due, and decides which of them need a message (again). One does
--
--   * when none went out yet: it was delayed, or its publication was not confirmed;
--   * when it was overtaken: a message of the same job name that went out later was claimed, so this one's is lost;
--   * as a probe, when nothing of its name was claimed for a while: a whole queue may be gone, or no worker be there.
--
-- Probes back off, doubling, one job at a time; the others are put off. So a deep queue never fills with copies of
-- itself. Nothing is dispatched here: redispatch.lua does that, and checks again.
-- KEYS 1 waiting zset, 2 claimed hash, then the record of each job
-- ARGV 1 dispatch_after_ms, 2 max_after_ms, then the id of each job
-- REPLIES one of DISPATCH, POSTPONED, GONE for each job, in order

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local after, max_after = tonumber(ARGV[1]), tonumber(ARGV[2])

-- Whether it is time to send one more message of this name, to see what happens.
local function probe(name, claimed_at, probes, probed_at)
  if probed_at <= claimed_at then
    probes = 0 -- the queue has moved since the last probe
  end
  local quiet = now - math.max(claimed_at, probed_at)
  if quiet < math.min(after * 2 ^ math.min(probes, 40), max_after) then
    return false
  end
  redis.call('HSET', KEYS[2], name .. '|probes', probes + 1, name .. '|probed', string.format('%.0f', now))
  return true
end

local replies = {}
for n = 3, #KEYS do
  local id = ARGV[n]
  local status, name, dispatched = unpack(redis.call('HMGET', KEYS[n], 'status', 'name', 'dispatched'))
  if not status then
    redis.call('ZREM', KEYS[1], id) -- the record was deleted by hand
    replies[n - 2] = 'GONE'
  elseif status ~= 'Queued' and status ~= 'Scheduled' then
    replies[n - 2] = 'GONE' -- claimed or canceled since it was found due
  elseif dispatched == '' then
    replies[n - 2] = 'DISPATCH'
  else
    local reached, claimed_at, probes, probed_at =
      unpack(redis.call('HMGET', KEYS[2], name, name .. '|at', name .. '|probes', name .. '|probed'))
    local overtaken = reached and tonumber(dispatched) < tonumber(reached)
    if overtaken or probe(name, tonumber(claimed_at or 0), tonumber(probes or 0), tonumber(probed_at or 0)) then
      replies[n - 2] = 'DISPATCH'
    else
      redis.call('ZADD', KEYS[1], 'XX', string.format('%.0f', now + after), id)
      replies[n - 2] = 'POSTPONED'
    end
  end
end
return replies
