-- Put in front of every script of one job. Keys and arguments get their names here, in one place:
--
--   KEYS  1 job      hash    the record
--         2 request  string  the captured request, as JSON; gone once the job completed
--         3 waiting  zset    ids of Queued and Scheduled jobs, by the time the sweep must dispatch them (again)
--         4 running  zset    ids of InProgress jobs, by the end of their lease
--         5 ended    zset    ids of jobs that are over, by the end of their retention
--         6 jobs     zset    ids of all jobs, by creation
--         7 claimed  hash    for each job name, how far its queue is: see judge.lua
--         8 …                the broker's keys, one for each command of the Celery message
--   ARGV  1 id, 2 channel (told of every change), then what the script's "-- ARGS" line names,
--         then, for scripts that dispatch, the commands of the message: name, number of arguments, arguments …
--
-- Redis TIME is the only clock; all times are milliseconds since the epoch, all spans milliseconds.

local JOB, REQUEST, WAITING, RUNNING, ENDED, JOBS, CLAIMED = unpack(KEYS, 1, 7)
local id, channel = ARGV[1], ARGV[2]

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

-- Lua would print a large number as 1.76e+12.
local function text(number)
  return string.format('%.0f', number)
end

local function is_waiting(status)
  return status == 'Queued' or status == 'Scheduled'
end

-- Write fields together with what every change carries, and tell whoever waits for this job.
local function change(status, ...)
  redis.call('HSET', JOB, 'status', status, 'updated', text(now), ...)
  local version = redis.call('HINCRBY', JOB, 'version', 1)
  redis.call('PUBLISH', channel, text(version) .. ' ' .. status)
end

-- Hand the Celery message to the broker: the commands kombu would have sent, from argument `first` on.
local function dispatch(first)
  local key, arg = 8, first
  while ARGV[arg] do
    local command, count = ARGV[arg], tonumber(ARGV[arg + 1])
    redis.call(command, KEYS[key], unpack(ARGV, arg + 2, arg + 1 + count))
    key, arg = key + 1, arg + 2 + count
  end
end

-- The job is over: it leaves the indices of the living, and its record gets an end of life.
local function finish(status, ...)
  redis.call('HDEL', JOB, 'runner', 'worker', 'deadline', 'cancel', 'copies', 'dispatched', 'nonce')
  change(status, 'completed', text(now), ...)
  redis.call('ZREM', WAITING, id)
  redis.call('ZREM', RUNNING, id)
  local retention = tonumber(redis.call('HGET', JOB, 'retention'))
  redis.call('ZADD', ENDED, text(now + retention), id)
  redis.call('PEXPIRE', JOB, text(retention))
  if status == 'Completed' then
    redis.call('UNLINK', REQUEST)
  else
    -- A retry by hand needs it.
    redis.call('PEXPIRE', REQUEST, text(retention))
  end
end

-- The job waits (again), and the sweep looks at it at `due` unless a worker claimed it before. `dispatched` is when its
-- message went out, '' while none has: then its place in WAITING is its outbox entry.
local function wait(status, due, dispatched, ...)
  change(status, 'copies', '0', 'dispatched', dispatched, ...)
  redis.call('HDEL', JOB, 'runner', 'worker', 'deadline', 'cancel')
  redis.call('ZREM', RUNNING, id)
  redis.call('ZADD', WAITING, text(due), id)
end

-- When the message of the step at hand can be claimed: after its delay, if its commands came along from argument `first`
-- on; '' if not.
local function dispatch_time(first, delay)
  return ARGV[first] and text(now + (delay or 0)) or ''
end
