-- Shared by all scripts: the epoch of Redis' data, and of a channel. A channel `name` is P:{C}; its other keys
-- are derived from it, so an FCALL needs to name only one.

-- Digits of an id: Lua's own printing rounds from 2^53 / 100 on.
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

-- A primary without replicas frees its replication backlog after repl-backlog-ttl and then looks as if it had never been
-- promoted. A new replication id is known to be no promotion only if the mark was written at most this many milliseconds
-- before: repl-backlog-ttl is at least 2 s (`fanfare doctor` checks it), and every node's probe writes the mark.
local MARK_FRESH = 2000
-- Age in milliseconds at which a script writes the mark again. Probes run once a second.
local MARK_EVERY = 1000

-- Whether the server process started after `at`, or in the same second. Both times are in milliseconds.
local function started_after(server, at, now)
  local uptime, written = tonumber(string.match(server, 'uptime_in_seconds:(%d+)') or ''), tonumber(at or '')
  return uptime and written and math.floor(now / 1000) - uptime >= math.floor(written / 1000)
end

-- The epoch of the server's data. Between two scripts that see the same epoch, Redis lost no acknowledged write.
--
-- A primary keeps its master_replid, and no other primary ever has it: each start and each promotion takes a new one. It
-- also changes when the first replica attaches and when the backlog is freed (replication.c: changeReplicationId), and
-- nothing is lost then. The mark, a hash in the data, carries the epoch over such a change. With `durable` it also carries
-- the epoch over a restart. A promoted replica can look like a restart, so that is done only for a process that started
-- after the mark was written, and only if no replica was attached in this epoch.
local function current_epoch(prefix, durable)
  local key = prefix .. ':epoch'
  local mark = redis.pcall('HMGET', key, 'epoch', 'run', 'replid', 'at', 'copied')
  if mark.err then
    if not string.find(mark.err, '^WRONGTYPE') then
      error(mark)
    end
    redis.call('DEL', key) -- another program has written there: the mark is lost
    mark = {}
  end
  local now = math.floor(clock() / 1000)
  local epoch, age = mark[1], now - (tonumber(mark[4]) or 0)
  local info = redis.call('INFO', 'replication')
  local replid = string.match(info, 'master_replid:(%x+)')
  local copied = string.find(info, 'connected_slaves:[1-9]') and '1' or '0'
  local same = epoch and mark[3] == replid
  if same and age >= 0 and age < MARK_EVERY and (copied == '0' or mark[5] == '1') then
    return epoch
  end
  local server = redis.call('INFO', 'server')
  local run = string.match(server, 'run_id:(%x+)')
  if not run or not replid then
    error({err = 'ERR INFO shows no run_id or no master_replid, so a loss of events would go unnoticed'})
  end
  local promoted = string.find(info, 'master_replid2:0*[1-9a-f]')
  local changed = mark[2] == run and age >= 0 and age <= MARK_FRESH
  local restarted = mark[2] ~= run and durable and mark[5] == '0' and started_after(server, mark[4], now)
  if not same and not (epoch and not promoted and (changed or restarted)) then
    epoch = replid
  elseif mark[5] == '1' then
    copied = '1'
  end
  redis.call('HSET', key, 'epoch', epoch, 'run', run, 'replid', replid, 'at', show(now), 'copied', copied)
  return epoch
end

-- How long a channel that nobody follows is remembered if it never had an event: anyone may name any number of
-- channels, and Redis must not hold them for days. Whoever comes back later is told that events may be missing.
local UNUSED = 10 * 60 * 1000

-- The channel's head and base. Where acknowledged events may be lost (no meta, another epoch, a head behind what the caller has
-- seen, a base behind the one it knows) the channel gets a new base above every id that anyone may have seen, and its
-- history is emptied.
local function check_epoch(name, epoch, ttl, seen, known)
  local meta = name .. ':meta'
  local kept = redis.call('HMGET', meta, 'head', 'base', 'run')
  local head, base = tonumber(kept[1]), tonumber(kept[2])
  if head and base and head >= seen and base >= known and kept[3] == epoch then
    return head, base
  end
  local highest = math.max(head or 0, seen, known)
  local last = redis.call('XREVRANGE', name .. ':events', '+', '-', 'COUNT', 1)[1]
  if last then
    highest = math.max(highest, tonumber(string.match(last[1], '^%d+')))
  end
  local anchor = clock()
  if anchor <= highest then
    -- The clock was set back: others may have seen ids that nobody here knows.
    anchor = highest + 2 ^ 20 + anchor % 2 ^ 20
  end
  redis.call('DEL', name .. ':events')
  redis.call('HSET', meta, 'head', show(anchor), 'base', show(anchor), 'run', epoch)
  -- Where there were events their ids must not be given again, so that is remembered for as long as after an event.
  redis.call('PEXPIRE', meta, highest == 0 and math.min(UNUSED, 2 * ttl) or 2 * ttl)
  return anchor, anchor
end

-- Every id is below this, since JavaScript holds whole numbers exactly only up to here.
local ID_LIMIT = 2 ^ 53

local function is_id(value)
  return value >= 0 and value < ID_LIMIT and value == math.floor(value)
end

-- Ends a `guarded` function with an error: the data of one channel is wrong. Nodes recognize the first word.
local function fault(key, text)
  error({err = 'FAULT ' .. key .. ': ' .. text})
end

local function is_sound(head, base, seen, known)
  return is_id(head) and is_id(base) and base <= head and seen <= head and known <= base
end

-- The channel's head and base, as `check_epoch` finds them. Values in `meta` that no script would write count as lost. If
-- no ids are left for a base above those given, the channel stays at the last id and accepts no more events.
local function position(name, epoch, ttl, seen, known)
  local meta = name .. ':meta'
  local head, base = check_epoch(name, epoch, ttl, seen, known)
  if is_sound(head, base, seen, known) then
    return head, base
  end
  -- `check_epoch` puts a base less than 2^21 above the highest id.
  local no_room = head == base and head >= ID_LIMIT and head < ID_LIMIT + 2 ^ 21
  if not no_room then
    redis.call('HDEL', meta, 'head', 'base')
    head, base = check_epoch(name, epoch, ttl, seen, known)
  end
  if not is_sound(head, base, seen, known) then
    head, base = ID_LIMIT - 1, ID_LIMIT - 1
    redis.call('HSET', meta, 'head', show(head), 'base', show(base))
  end
  return head, base
end

-- Calls a function that works on one channel. If it fails because that channel's data is wrong, the result is an error that
-- names the key, so that only this channel is affected.
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

-- The key with the id of the event that was published under an idempotency key, and its expiry in ms.
local KEY_TTL = 10 * 60 * 1000
local function key_name(name, key)
  return name .. ':key:' .. key
end

-- The id of the event that was published under an idempotency key, if any.
local function published_under(key)
  local id = redis.pcall('GET', key)
  if type(id) == 'table' then
    if string.find(id.err, '^WRONGTYPE') then
      fault(key, 'another program has put a value of the wrong type there: delete this key')
    end
    error(id)
  end
  return id and tonumber(id)
end

-- A channel may hold this many events more than `history`, so that they are trimmed in one go.
local TRIM_EVENTS = 100
-- About this many bytes of events are read at once to learn the size of those that are trimmed.
local TRIM_READ = 64 * 1024

-- Trims a channel to its newest `history` events and to `history_bytes` of their text. `bytes` in `meta` is the size of all
-- events held: adds the size of those that this call stored, and subtracts the size of those trimmed, oldest first. Above
-- `history_bytes` a sixteenth is trimmed at once. The events that this call stored are kept. Returns the new `bytes`.
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

-- Stores the events: items are texts up to the id's digits (ending in "id":), each followed by the user it is for,
-- or ''. Returns the new head and the messages to publish: consecutive events for the same readers share one.
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
        -- Another program has set the head back. The next call finds no head and puts a new base above these events.
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

-- Publishes the messages, in id order. A refused PUBLISH must not look like a refused event: nodes read it after a probe.
local function announce(name, messages, bare)
  local pcall = redis.pcall
  for _, message in ipairs(messages) do
    local lines = table.concat(message, '\n')
    if message.user ~= '' then
      pcall('PUBLISH', name .. ':to', message.user .. '\n' .. lines)
    else
      pcall('PUBLISH', name, lines)
      if bare ~= '' then
        for _, json in ipairs(message) do
          pcall('PUBLISH', bare, '\t' .. json) -- the TAB tells nodes that it is a copy
        end
      end
    end
  end
end
