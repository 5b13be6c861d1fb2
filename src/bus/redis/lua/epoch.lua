-- Shared by all scripts: the epoch of the data, the position of a channel, and writing to its
-- stream. The `name` of a channel is P:{C}. Its other keys are derived from that, so an FCALL names
-- only one key.

-- The digits of an id. Lua's own conversion rounds from 2^53 / 100 on.
local function show(id)
  return string.format('%.0f', id)
end

-- The same, in less than half of the time, for values that `is_id` accepts.
local function digits_of(id)
  return string.format('%d', id)
end

local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

local function milliseconds()
  return math.floor(clock() / 1000)
end

-- On a Redis Cluster, nodes name the channel in the last argument instead of KEYS[1]: without
-- declared keys Redis runs a script wherever it is sent, and the script itself finds that keys are
-- elsewhere. An error of Redis that starts with CLUSTERDOWN would close fred's connection.
local function channel_of(keys, args)
  return keys[1] or table.remove(args)
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
-- started after the record was written, and only if no replica was connected in this epoch. `now` is
-- the time in milliseconds. Also returns whether a replica is connected.
--
-- On a Redis Cluster (`kind`), a record would be in the slot of another primary, so the replication
-- id alone is the epoch.
local is_cluster = false
local function current_epoch(prefix, kind, now)
  is_cluster = kind == 'cluster'
  if is_cluster then
    local info = redis.call('INFO', 'replication')
    local replid = string.match(info, 'master_replid:(%x+)')
    if not replid then
      error({err = 'ERR INFO shows no master_replid, so a loss of events would go unnoticed'})
    end
    return replid, true
  end
  local durable = kind == 'durable'
  local key = prefix .. ':epoch'
  local record = redis.pcall('HMGET', key, 'epoch', 'run', 'replid', 'at', 'copied')
  if record.err then
    if not string.find(record.err, '^WRONGTYPE') then
      error(record)
    end
    redis.call('DEL', key) -- another program has overwritten the record
    record = {}
  end
  local epoch, age = record[1], now - (tonumber(record[4]) or 0)
  local info = redis.call('INFO', 'replication')
  -- A plain search first: a pattern that is tried at every byte takes longer than INFO.
  local _, before_replid = string.find(info, 'master_replid:', 1, true)
  local replid = before_replid and string.match(info, '^%x+', before_replid + 1)
  local is_copied = not string.find(info, 'connected_slaves:0', 1, true)
  local copied = is_copied and '1' or '0'
  local same = epoch and record[3] == replid
  if same and age >= 0 and age < RECORD_INTERVAL and (not is_copied or record[5] == '1') then
    return epoch, is_copied
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
    copied = '1'
  end
  redis.call('HSET', key, 'epoch', epoch, 'run', run_id, 'replid', replid, 'at', show(now), 'copied', copied)
  return epoch, is_copied
end

-- Expiry of a channel that never had an event and is not followed, in milliseconds: clients may
-- name any number of channels, and Redis must not hold them for days. Clients that come back later
-- get recovered:false.
local UNUSED_TTL = 10 * 60 * 1000

-- Fails if the slot of a channel is moving to this primary of a cluster and not all of these keys
-- have come yet: they must not be created a second time.
local function check_arrived(...)
  if is_cluster then
    redis.call('EXISTS', ...)
  end
end

-- Least expiry of the events of the control channel, in milliseconds: nodes that were cut off for a
-- day execute the commands that they missed.
local CONTROL_TTL = 24 * 60 * 60 * 1000

-- The expiry of a channel's `meta`. `unused`: it never had an event.
local function expiry(name, ttl, unused)
  if string.sub(name, -10) == '{@control}' then
    return 2 * math.max(ttl, CONTROL_TTL)
  end
  return unused and math.min(UNUSED_TTL, 2 * ttl) or 2 * ttl
end

-- The channel's head and base. If acknowledged events may be lost (no meta, another epoch, a head
-- behind what the caller has seen, a base behind the one it knows), the channel gets a new base
-- above every id that anyone may have seen, and its history is emptied. Also returns the fields
-- `bytes`, `kept` and `extra` of `meta`, which its writers read.
local function check_epoch(name, epoch, ttl, seen, known, extra)
  local meta = name .. ':meta'
  local stored = redis.call('HMGET', meta, 'head', 'base', 'run', 'bytes', 'kept', extra)
  local head, base = tonumber(stored[1]), tonumber(stored[2])
  if head and base and head >= seen and base >= known and stored[3] == epoch then
    return head, base, stored[4], stored[5], stored[6]
  end
  check_arrived(meta, name .. ':events')
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
  redis.call('PEXPIRE', meta, expiry(name, ttl, highest == 0))
  return new_base, new_base, stored[4], stored[5], stored[6]
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
local function checked_position(name, epoch, ttl, seen, known, extra)
  local meta = name .. ':meta'
  extra = extra or 'head'
  local head, base, bytes, kept, value = check_epoch(name, epoch, ttl, seen, known, extra)
  if is_sound(head, base, seen, known) then
    return head, base, bytes, kept, value
  end
  -- `check_epoch` sets a base less than 2^21 above the highest id.
  local exhausted = head == base and head >= ID_LIMIT and head < ID_LIMIT + 2 ^ 21
  if not exhausted then
    redis.call('HDEL', meta, 'head', 'base')
    head, base = check_epoch(name, epoch, ttl, seen, known, extra)
  end
  if not is_sound(head, base, seen, known) then
    head, base = ID_LIMIT - 1, ID_LIMIT - 1
    redis.call('HSET', meta, 'head', show(head), 'base', show(base))
  end
  return head, base, bytes, kept, value
end

-- What an error of Redis about the state of a cluster means, or nil. Nothing was published then: a
-- channel's first command fails, or the first that needs a key that has not come yet.
local CLUSTER_DOWN = 'TRYAGAIN the cluster is down'
local function cluster_error(text)
  if string.find(text, 'non local key', 1, true) then
    return 'TRYAGAIN the keys of this channel are at another primary, or move there'
  elseif string.find(text, 'the cluster is down', 1, true) then
    return CLUSTER_DOWN
  end
end

-- Calls a function that works on one channel. If it fails because the data of that channel is
-- damaged, the result is an error that names the key, so that only this channel is affected.
local function guarded(name, work, ...)
  local done, result = pcall(work, ...)
  if done then
    return result
  end
  local text = type(result) == 'table' and result.err or tostring(result)
  local temporary = cluster_error(text)
  if temporary or string.find(text, '^FAULT ') then
    return {err = temporary or text}
  end
  local meta, events = name .. ':meta', name .. ':events'
  local inbox = redis.pcall('XLEN', name .. ':inbox')
  local wrong = redis.pcall('HMGET', meta, 'head').err and meta
    or redis.pcall('XRANGE', events, '-', '+', 'COUNT', 1).err and events
    or type(inbox) == 'table' and string.find(inbox.err, '^WRONGTYPE') and name .. ':inbox'
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

-- The id that was remembered for an idempotency key, as a text, if any.
local function remembered(key)
  local id = redis.pcall('GET', key)
  if type(id) == 'table' then
    if string.find(id.err, '^WRONGTYPE') then
      fault(key, 'another program has put a value of the wrong type there: delete this key')
    end
    error(id)
  end
  return id
end

-- The id of the event that was published to `name` with an idempotency key, if any.
local function published_with(name, key)
  local id = remembered(key)
  if not id then
    check_arrived(key, name .. ':meta')
  end
  return id and tonumber(id)
end

-- A channel is trimmed once in this many events, and once in each such part of `history_bytes`.
local TRIM_EVENTS, TRIM_PARTS = 100, 16

-- Trims a channel to its newest `history` events and, if `marks` was not empty, to 15/16 of
-- `history_bytes`, oldest first, so that it stays below them until the next time. A mark is the id of
-- an event and the bytes of all events up to it: the field `marks` of `meta` has one for each part
-- that is held, so what to keep is found without reading what goes. The events from `first` on are
-- those of this call and stay.
local function trim(name, first, head, bytes, marks, history, history_bytes)
  local keep_from = head - history + 1
  if marks ~= '' then
    marks = (redis.call('HGET', name .. ':meta', 'marks') or '') .. marks
    local go, left = bytes - history_bytes / TRIM_PARTS * (TRIM_PARTS - 1), {}
    for id, total in string.gmatch(marks, '(%d+) (%d+),') do
      if #left > 0 or tonumber(total) >= go then
        left[#left + 1] = id .. ' ' .. total .. ','
      end
    end
    local id, total = string.match(left[1] or '', '(%d+) (%d+)')
    if id and (go > 0 or tonumber(total) > bytes) then -- another program may have set `bytes` back
      keep_from = math.max(keep_from, tonumber(id) + 1)
      left[1] = ''
    end
    redis.call('HSET', name .. ':meta', 'marks', table.concat(left))
  end
  redis.call('XTRIM', name .. ':events', 'MINID', show(math.max(0, math.min(keep_from, first))))
end

-- The expiry of a channel's keys is renewed after this part of `--history-ttl`, and is that much
-- longer.
local KEEP_PARTS = 16

-- Adds the first event of a call. Returns the reply, and whether the stream is new.
local function add_first(events, meta, id, json, to)
  local added = redis.pcall('XADD', events, 'NOMKSTREAM', id, 'e', json, unpack(to))
  if added then
    return added, false
  end
  check_arrived(events, meta)
  return redis.pcall('XADD', events, id, 'e', json, unpack(to)), true
end

-- Stores events after `head`. `bytes` and `kept` are these fields of `meta`: the bytes of all events
-- so far, and when the expiry was renewed, in milliseconds. `items` holds from `start` on runs of
-- consecutive events for the same recipients: the user they are for or '', their number, then the
-- text of each up to the id's digits (ending in "id":). The fields in `more` are stored, too.
-- Returns the new head, and the messages to publish, one for each run.
local function append(name, head, bytes, kept, items, start, settings, now, more)
  local events, meta, first = name .. ':events', name .. ':meta', head + 1
  local pcall, messages, at = redis.pcall, {}, start
  bytes, kept = tonumber(bytes or ''), tonumber(kept or '')
  if not bytes or not is_id(bytes) then
    bytes = 0 -- the first event, or written by another program
  end
  local part, marks = settings.bytes / TRIM_PARTS, ''
  local next_mark = (math.floor(bytes / part) + 1) * part
  if head + (#items - start - 1) >= ID_LIMIT then
    fault(meta, 'no ids are left below 2^53: delete this key and ' .. events ..
      ' once no node has had a client in the channel for two minutes')
  end
  while at < #items do
    local user, message = items[at], {}
    for i = 1, tonumber(items[at + 1]) do
      head = head + 1
      local digits = digits_of(head)
      local json = items[at + 1 + i] .. digits .. '}'
      local id, added, is_new = digits .. '-0', nil, nil
      if head == first then
        added, is_new = add_first(events, meta, id, json, user == '' and {} or {'to', user})
        kept = not is_new and kept -- a new stream has no expiry
      elseif user == '' then
        added = pcall('XADD', events, id, 'e', json)
      else
        added = pcall('XADD', events, id, 'e', json, 'to', user)
      end
      if type(added) == 'table' then
        if head == first and string.find(added.err, 'equal or smaller') then
          -- Another program has set the head back. The next call finds no head and sets a new base
          -- above these events.
          redis.call('HDEL', meta, 'head', 'base')
          fault(events, 'it has events beyond the last id: the channel gets a new base')
        end
        error(added)
      end
      message[i] = json
      bytes = bytes + #json
      if bytes >= next_mark then
        marks = marks .. digits .. ' ' .. digits_of(bytes) .. ','
        next_mark = (math.floor(bytes / part) + 1) * part
      end
    end
    message.user = user
    messages[#messages + 1] = message
    at = at + 2 + #message
  end
  if marks ~= '' or math.floor(head / TRIM_EVENTS) > math.floor((first - 1) / TRIM_EVENTS) then
    trim(name, first, head, bytes, marks, settings.history, settings.bytes)
  end
  local fields = {'HSET', meta, 'head', digits_of(head), 'bytes', digits_of(bytes), unpack(more)}
  local interval = settings.ttl / KEEP_PARTS
  if not kept or now < kept or now - kept >= interval then
    redis.call('PEXPIRE', meta, digits_of(2 * (settings.ttl + interval)))
    redis.call('PEXPIRE', events, digits_of(settings.ttl + interval))
    fields[#fields + 1], fields[#fields + 2] = 'kept', digits_of(now)
  end
  redis.call(unpack(fields))
  return head, messages
end

-- Whether a program that is no fanfare node may listen to the Pub/Sub channel here. A node that
-- listens to it also subscribes to a channel of its own prefix, in the same SUBSCRIBE.
local function is_heard(name, pubsub_channel)
  local subscribers = redis.pcall('PUBSUB', 'NUMSUB', pubsub_channel, name .. ':pubsub')
  local patterns = redis.pcall('PUBSUB', 'NUMPAT')
  return subscribers.err or patterns ~= 0 or subscribers[2] > subscribers[4]
end

-- Publishes messages in id order. A PUBLISH that fails must not look like a rejected event: nodes
-- read it after a probe. Subscribers of replicas can't be counted, so with a connected replica
-- (`is_copied`) all copies are published.
local function publish_messages(name, messages, pubsub_channel, is_copied)
  local pcall = redis.pcall
  local copies = pubsub_channel ~= '' and (is_copied or is_heard(name, pubsub_channel))
  for _, message in ipairs(messages) do
    local lines = table.concat(message, '\n')
    if message.user ~= '' then
      pcall('PUBLISH', name .. ':to', message.user .. '\n' .. lines)
    else
      pcall('PUBLISH', name, lines)
      if copies then
        for _, json in ipairs(message) do
          pcall('PUBLISH', pubsub_channel, '\t' .. json) -- the TAB marks a copy, which nodes ignore
        end
      end
    end
  end
end
