-- Shared by all scripts: the run of a channel, and re-anchoring. A channel `name` is P:{C}; its other keys
-- are derived from it, so an FCALL needs to name only one.

-- Digits of an id: Lua's own printing rounds from 2^53 / 100 on.
local function show(id)
  return string.format('%.0f', id)
end

-- What tells this run of Redis from any other, and whether it never was a copy of another.
local function current_run()
  local info = redis.call('INFO', 'server', 'replication')
  local copied_from = string.match(info, 'master_replid2:(%x+)')
  return string.match(info, 'run_id:(%x+)') .. ' ' .. copied_from, not string.find(copied_from, '[^0]')
end

local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2])
end

-- How long a channel that nobody follows is remembered if it never had an event: anyone may name any number of
-- channels, and Redis must not hold them for days. Whoever comes back later is told that events may be missing.
local UNUSED = 10 * 60 * 1000

-- The channel's head and base, after looking whether acknowledged events may be gone: no meta, another run,
-- a head behind what the caller has seen, or a base behind the one it knows. Then the channel gets a new base,
-- ahead of every id that anyone may have seen, and an empty history.
local function look(name, run, original, durable, ttl, seen, known)
  local meta = name .. ':meta'
  local kept = redis.call('HMGET', meta, 'head', 'base', 'run')
  local head, base = tonumber(kept[1]), tonumber(kept[2])
  if head and base and head >= seen and base >= known then
    if kept[3] == run then
      return head, base
    end
    if durable and original then
      redis.call('HSET', meta, 'run', run)
      return head, base
    end
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
  redis.call('HSET', meta, 'head', show(anchor), 'base', show(anchor), 'run', run)
  -- Where there were events their ids must not be given again, so that is remembered for as long as after an event.
  redis.call('PEXPIRE', meta, highest == 0 and math.min(UNUSED, 2 * ttl) or 2 * ttl)
  return anchor, anchor
end

-- JavaScript holds whole numbers below this exactly, and every id is below it.
local ID_LIMIT = 2 ^ 53

local function is_id(value)
  return value >= 0 and value < ID_LIMIT and value == math.floor(value)
end

-- Ends a `guarded` function: the data of one channel is wrong. Nodes know this by the first word.
local function fault(key, text)
  error({err = 'FAULT ' .. key .. ': ' .. text})
end

local function is_sound(head, base, seen, known)
  return is_id(head) and is_id(base) and base <= head and seen <= head and known <= base
end

-- The channel's head and base, as `look` finds them. Values in `meta` that no script writes count as lost. Where the
-- ids that were given leave no room for a base above them, the channel stands at the last id and takes no more events.
local function position(name, run, original, durable, ttl, seen, known)
  local meta = name .. ':meta'
  local head, base = look(name, run, original, durable, ttl, seen, known)
  if is_sound(head, base, seen, known) then
    return head, base
  end
  -- `look` puts a base less than 2^21 above the highest id.
  local no_room = head == base and head >= ID_LIMIT and head < ID_LIMIT + 2 ^ 21
  if not no_room then
    redis.call('HDEL', meta, 'head', 'base')
    head, base = look(name, run, original, durable, ttl, seen, known)
  end
  if not is_sound(head, base, seen, known) then
    head, base = ID_LIMIT - 1, ID_LIMIT - 1
    redis.call('HSET', meta, 'head', show(head), 'base', show(base))
  end
  return head, base
end

-- Calls a function that works on one channel. If that fails for a fault in the channel's own data, the result is an
-- error that names the key, so that it costs this channel alone.
local function guarded(name, work, ...)
  local done, result = pcall(work, ...)
  if done then
    return result
  end
  local text = type(result) == 'table' and result.err or tostring(result)
  if string.find(text, '^WRONGTYPE') then
    local meta = name .. ':meta'
    local key = redis.pcall('HMGET', meta, 'head').err and meta or name .. ':events'
    return {err = 'FAULT ' .. key .. ': another program has put a value of the wrong type there: delete this key'}
  elseif string.find(text, '^FAULT ') then
    return {err = text}
  end
  error(result)
end

-- Stores the events and tells everyone: items are texts up to the id's digits (ending in "id":), each followed
-- by the user it is for, or ''. Returns the new head, and what to tell.
local function append(name, head, items, start, history, ttl)
  local events = name .. ':events'
  local call = redis.call
  local messages, lines = {}, {}
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
      lines[#lines + 1] = json
    else
      added = redis.pcall('XADD', events, digits .. '-0', 'e', json, 'to', user)
      if lines[1] then
        messages[#messages + 1] = lines
        lines = {}
      end
      messages[#messages + 1] = user .. '\n' .. json
    end
    if type(added) == 'table' then
      if i == start and string.find(added.err, 'equal or smaller') then
        -- Another program has set the head back. The next call finds none, and anchors above these events.
        call('HDEL', name .. ':meta', 'head', 'base')
        fault(events, 'it has events beyond the last id: the channel gets a new base')
      end
      error(added)
    end
  end
  if lines[1] then
    messages[#messages + 1] = lines
  end
  call('HSET', name .. ':meta', 'head', show(head))
  call('PEXPIRE', name .. ':meta', 2 * ttl)
  call('XTRIM', events, 'MAXLEN', '~', history)
  call('PEXPIRE', events, ttl)
  return head, messages
end

-- Tells everyone, in id order. A refused PUBLISH must not look like a refused event: canaries heal it.
local function announce(name, messages, bare)
  local pcall = redis.pcall
  for _, message in ipairs(messages) do
    if type(message) == 'string' then
      pcall('PUBLISH', name .. ':to', message)
    else
      pcall('PUBLISH', name, table.concat(message, '\n'))
      if bare ~= '' then
        for _, json in ipairs(message) do
          pcall('PUBLISH', bare, '\t' .. json) -- the TAB tells nodes that it is a copy
        end
      end
    end
  end
end
