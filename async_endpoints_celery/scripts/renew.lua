-- renew: one call extends the leases of all jobs that a worker node runs, and hears which were lost or canceled.
-- KEYS 1 running zset, then the record of each job
-- ARGV 1 lease_ms, 2 grace_ms, then id and runner of each job
-- REPLIES one of RENEWED, CANCELING, LOST, UNCLAIMED for each job, in order

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local replies = {}
for n = 2, #KEYS do
  local id, runner = ARGV[2 * n - 1], ARGV[2 * n]
  local status, holder, deadline, canceling =
    unpack(redis.call('HMGET', KEYS[n], 'status', 'runner', 'deadline', 'cancel'))
  if status == 'InProgress' and holder == runner then
    -- Past its deadline a job is not kept any longer, however alive its worker is.
    local lease = math.min(now + tonumber(ARGV[1]), tonumber(deadline) + tonumber(ARGV[2]))
    redis.call('ZADD', KEYS[1], string.format('%.0f', lease), id)
    replies[n - 1] = canceling and 'CANCELING' or 'RENEWED'
  elseif status == 'Queued' or status == 'Scheduled' then
    replies[n - 1] = 'UNCLAIMED' -- the pool has it and has not claimed it yet
  else
    replies[n - 1] = 'LOST'
  end
end
return replies
