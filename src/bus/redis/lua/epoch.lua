-- Shared by all scripts: the epoch of the data, the position of a channel, and writing to its
-- stream. The `name` of a channel is P:{C}. Its other keys are derived from that, so an FCALL names
-- only one key.

-- The digits of an id. Lua's own conversion rounds from 2^53 / 100 on.
local function show(id)
  return string.format('%.0f', id)
end

local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

-- The prefix of the channel `name`.
local function prefix_of(name)
  return string.match(name, '^(.-):{')
end

-- The key P:epoch holds a record of the epoch. A primary without replicas frees its replication
-- backlog after repl-backlog-ttl, and then looks as if it had never been promoted. So a new
-- replication id is known to be no promotion only if the record is at most this old, in
-- milliseconds: repl-backlog-ttl is at least 2 s (`fanfare doctor` checks it), and the probe of
-- every node writes the record.
local RECORD_FRESH = 2000
-- Age in milliseconds at which a script writes the record again. Probes run once a second.
local RECORD_INTERVAL = 1000

-- Whether the server process started after `at`, or in the same second. Times are in milliseconds.
local function started_after(server, at, now)
  local uptime, written = tonumber(string.match(server, 'uptime_in_seconds:(%d+)') or ''), tonumber(at or '')
  return uptime and written and math.floor(now / 1000) - uptime >= math.floor(written / 1000)
end

-- The epoch of the data. Between two scripts that see the same epoch, Redis lost no acknowledged
-- write.
--
-- A primary keeps its master_replid, and no other primary ever has it: each start and each
-- promotion takes a new one. It also changes when the first replica attaches and when the backlog
-- is freed (replication.c: changeReplicationId), and nothing is lost then. The record, which is
-- part of the data, keeps the epoch over such a change. With `durable` it also keeps the epoch over
-- a restart. A promoted replica can look like a restart, so that is done only for a process that
-- started after the record was written, and only if no replica was connected in this epoch.
local function current_epoch(prefix, durable)
  local key = prefix .. ':epoch'
  local record = redis.pcall('HMGET', key, 'epoch', 'run', 'replid', 'at', 'copied')
  if record.err then
    if not string.find(record.err, '^WRONGTYPE') then
      error(record)
    end
    redis.call('DEL', key) -- another program has overwritten the record
    record = {}
  end
  local now = math.floor(clock() / 1000)
  local epoch, age = record[1], now - (tonumber(record[4]) or 0)
  local info = redis.call('INFO', 'replication')
  local replid = string.match(info, 'master_replid:(%x+)')
  local replicated = string.find(info, 'connected_slaves:[1-9]') and '1' or '0'
  local same = epoch and record[3] == replid
  if same and age >= 0 and age < RECORD_INTERVAL and (replicated == '0' or record[5] == '1') then
    return epoch
  end
  local server = redis.call('INFO', 'server')
  local run_id = string.match(server, 'run_id:(%x+)')
  if not run_id or not replid then
    error({err = 'ERR INFO shows no run_id or no master_replid, so a loss of events would go unnoticed'})
  end
  local promoted = string.find(info, 'master_replid2:0*[1-9a-f]')
  local changed = record[2] == run_id and age >= 0 and age <= RECORD_FRESH
  local restarted = record[2] ~= run_id and durable and record[5] == '0' and started_after(server, record[4], now)
  if not same and not (epoch and not promoted and (changed or restarted)) then
    epoch = replid
  elseif record[5] == '1' then
    replicated = '1'
  end
  redis.call('HSET', key, 'epoch', epoch, 'run', run_id, 'replid', replid, 'at', show(now), 'copied', replicated)
  return epoch
end

-- Expiry of a channel that never had an event and is not followed, in milliseconds: clients may
-- name any number of channels, and Redis must not hold them for days. Clients that come back later
-- get recovered:false.
local UNUSED_TTL = 10 * 60 * 1000

-- The channel's head and base. If acknowledged events may be lost (no meta, another epoch, a head
-- behind what the caller has seen, a base behind the one it knows), the channel gets a new base
-- above every id that anyone may have seen, and its history is emptied.
local function check_epoch(name, epoch, ttl, seen, known)
  local meta = name .. ':meta'
  local stored = redis.call('HMGET', meta, 'head', 'base', 'run')
  local head, base = tonumber(stored[1]), tonumber(stored[2])
  if head and base and head >= seen and base >= known and stored[3] == epoch then
    return head, base
  end
  local highest = math.max(head or 0, seen, known)
  local last = redis.call('XREVRANGE', name .. ':events', '+', '-', 'COUNT', 1)[1]
  if last then
    highest = math.max(highest, tonumber(string.match(last[1], '^%d+')))
  end
  local new_base = clock()
  if new_base <= highest then
    -- The clock was set back: other nodes may have seen higher ids than the caller.
    new_base = highest + 2 ^ 20 + new_base % 2 ^ 20
  end
  redis.call('DEL', name .. ':events')
  redis.call('HSET', meta, 'head', show(new_base), 'base', show(new_base), 'run', epoch)
  -- If there were events, their ids must not be used again, so the key is kept for as long as after
  -- an event.
  redis.call('PEXPIRE', meta, highest == 0 and math.min(UNUSED_TTL, 2 * ttl) or 2 * ttl)
  return new_base, new_base
end

-- All ids are below this: JavaScript holds integers exactly up to here.
local ID_LIMIT = 2 ^ 53

local function is_id(value)
  return value >= 0 and value < ID_LIMIT and value == math.floor(value)
end

-- Ends a `guarded` function with an error: the data of one channel is damaged. Nodes recognize the
-- first word.
local function fault(key, text)
  error({err = 'FAULT ' .. key .. ': ' .. text})
end

local function is_sound(head, base, seen, known)
  return is_id(head) and is_id(base) and base <= head and seen <= head and known <= base
end

-- The channel's head and base, as `check_epoch` returns them. Values in `meta` that no script would
-- write count as lost. If no ids are left for a base above those used, the channel stays at the
-- last id and accepts no more events.
local function checked_position(name, epoch, ttl, seen, known)
  local meta = name .. ':meta'
  local head, base = check_epoch(name, epoch, ttl, seen, known)
  if is_sound(head, base, seen, known) then
    return head, base
  end
  -- `check_epoch` sets a base less than 2^21 above the highest id.
  local exhausted = head == base and head >= ID_LIMIT and head < ID_LIMIT + 2 ^ 21
  if not exhausted then
    redis.call('HDEL', meta, 'head', 'base')
    head, base = check_epoch(name, epoch, ttl, seen, known)
  end
  if not is_sound(head, base, seen, known) then
    head, base = ID_LIMIT - 1, ID_LIMIT - 1
    redis.call('HSET', meta, 'head', show(head), 'base', show(base))
  end
  return head, base
end

-- Calls a function that works on one channel. If it fails because the data of that channel is
-- damaged, the result is an error that names the key, so that only this channel is affected.
local function guarded(name, work, ...)
  local done, result = pcall(work, ...)
  if done then
    return result
  end
  local text = type(result) == 'table' and result.err or tostring(result)
  if string.find(text, '^FAULT ') then
    return {err = text}
  end
  local meta, events = name .. ':meta', name .. ':events'
  local wrong = redis.pcall('HMGET', meta, 'head').err and meta
    or redis.pcall('XRANGE', events, '-', '+', 'COUNT', 1).err and events
  if string.find(text, '^WRONGTYPE') and wrong then
    return {err = 'FAULT ' .. wrong .. ': another program has put a value of the wrong type there: delete this key'}
  end
  error(result)
end

-- The Redis key with the id of the event that was published with an idempotency key, and its expiry
-- in ms. local/idempotency.rs has the same time.
local KEY_TTL = 10 * 60 * 1000
local function key_name(name, key)
  return name .. ':key:' .. key
end

-- The id of the event that was published with an idempotency key, if any.
local function published_with(key)
  local id = redis.pcall('GET', key)
  if type(id) == 'table' then
    if string.find(id.err, '^WRONGTYPE') then
      fault(key, 'another program has put a value of the wrong type there: delete this key')
    end
    error(id)
  end
  return id and tonumber(id)
end

-- A channel may hold this many events more than `history`, so that they are trimmed together.
local TRIM_EVENTS = 100
-- About how many bytes of events are read at a time to add up the size of those that are trimmed.
local TRIM_READ = 64 * 1024

-- Trims a channel to its newest `history` events and to `history_bytes` of their text, oldest
-- first. `bytes` in `meta` is the size of all events held: adds the size of those that this call
-- stored and subtracts the size of those trimmed. Above `history_bytes` a sixteenth is trimmed at
-- once. The events that this call stored are kept. Returns the new `bytes`.
local function trim(name, stored, stored_bytes, history, history_bytes)
  local events = name .. ':events'
  local length, bytes = redis.call('XLEN', events), stored_bytes
  if length > stored then
    bytes = bytes + (tonumber(redis.call('HGET', name .. ':meta', 'bytes') or '') or 0)
  end
  local excess = length - history
  if bytes > history_bytes then
    history_bytes = history_bytes / 16 * 15
  elseif excess < TRIM_EVENTS then
    excess = 0
  end
  local from, left = '-', length - stored
  local count = math.ceil(math.min(TRIM_EVENTS, TRIM_READ * length / bytes))
  while left > 0 and (excess > 0 or bytes > history_bytes) do
    for _, item in ipairs(redis.call('XRANGE', events, from, '+', 'COUNT', math.min(left, count))) do
      if excess > 0 or bytes > history_bytes then
        from, left, excess, bytes = '(' .. item[1], left - 1, excess - 1, bytes - #item[2][2]
      end
    end
  end
  if from ~= '-' then
    redis.call('XTRIM', events, 'MINID', redis.call('XRANGE', events, from, '+', 'COUNT', 1)[1][1])
  end
  return math.max(bytes, 0)
end

-- Stores events. `items` holds for each its text up to the id's digits (ending in "id":) and the
-- user it is for, or ''.
-- Returns the new head, and the messages to publish: consecutive events for the same recipients
-- share one.
local function append(name, head, items, start, history, history_bytes, ttl)
  local events = name .. ':events'
  local call = redis.call
  local messages, message, bytes = {}, nil, 0
  if head + (#items - start + 1) / 2 >= ID_LIMIT then
    fault(name .. ':meta', 'no ids are left below 2^53: delete this key and ' .. events ..
      ' once no node has had a client in the channel for two minutes')
  end
  for i = start, #items, 2 do
    head = head + 1
    local digits = show(head)
    local json = items[i] .. digits .. '}'
    local user = items[i + 1]
    local added
    if user == '' then
      added = redis.pcall('XADD', events, digits .. '-0', 'e', json)
    else
      added = redis.pcall('XADD', events, digits .. '-0', 'e', json, 'to', user)
    end
    if type(added) == 'table' then
      if i == start and string.find(added.err, 'equal or smaller') then
        -- Another program has set the head back. The next call finds no head and sets a new base
        -- above these events.
        call('HDEL', name .. ':meta', 'head', 'base')
        fault(events, 'it has events beyond the last id: the channel gets a new base')
      end
      error(added)
    end
    if not message or message.user ~= user then
      message = {user = user}
      messages[#messages + 1] = message
    end
    message[#message + 1] = json
    bytes = bytes + #json
  end
  bytes = trim(name, (#items - start + 1) / 2, bytes, history, history_bytes)
  call('HSET', name .. ':meta', 'head', show(head), 'bytes', show(bytes))
  call('PEXPIRE', name .. ':meta', 2 * ttl)
  call('PEXPIRE', events, ttl)
  return head, messages
end

-- Publishes messages in id order. A PUBLISH that fails must not look like a rejected event: nodes
-- read it after a probe.
local function publish_messages(name, messages, pubsub_channel)
  local pcall = redis.pcall
  for _, message in ipairs(messages) do
    local lines = table.concat(message, '\n')
    if message.user ~= '' then
      pcall('PUBLISH', name .. ':to', message.user .. '\n' .. lines)
    else
      pcall('PUBLISH', name, lines)
      if pubsub_channel ~= '' then
        for _, json in ipairs(message) do
          pcall('PUBLISH', pubsub_channel, '\t' .. json) -- the TAB marks a copy, which nodes ignore
        end
      end
    end
  end
end
