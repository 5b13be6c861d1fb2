-- Stores messages in the inbox of a channel, once per number.
-- KEYS[1] P:{C}
-- ARGV:
--    1 kind of Redis: durable, volatile or cluster
--    2 history ttl in ms
--    3 the highest id seen
--    4 the base known
--    5 node
--    6 number of the call
--    7 retry (1 or 0)
--    8 how long the number is remembered, in ms
--    9 most messages in the inbox
--    10 the channel
--    11 most bytes in the inbox, about
--    then for each message: the user who sent it, the user it is for or '', its idempotency key or '',
--    its JSON
-- Returns {1, base, head, id, id, ...}, with '' for a message for which the inbox has no room; or
-- {0, base, head}: the messages may or may not have been stored, and never will be.
-- Without messages it asks about an earlier attempt: {2, base, head} if that was not stored. It can't
-- be stored later either, since its number is used up then.
local now = milliseconds()
local epoch = current_epoch(prefix_of(KEYS[1]), ARGV[1], now)
local FIRST = 12 -- the first message in ARGV

-- The key that remembers the id of a user's message. The length of the user's name keeps users apart,
-- since it may contain colons.
local function message_key(name, user, key)
  return name .. ':inbox:key:' .. #user .. ':' .. user .. ':' .. key
end

local function id_of(time, sequence)
  return show(time) .. '-' .. show(sequence)
end

-- The ids of an earlier attempt, by its record in `meta`. Messages with a key are found by it.
local function ids_of(name, record)
  local time, sequence, first, stored = string.match(record, '^%d+ 0 (%d+) (%d+) (%d+) (%d+) ')
  if not time then
    return nil
  end
  local ids = {}
  for i = 1, (#ARGV - FIRST + 1) / 4 do
    local at = FIRST + 4 * (i - 1)
    local earlier = ARGV[at + 2] ~= '' and remembered(message_key(name, ARGV[at], ARGV[at + 2]))
    if earlier then
      ids[i] = earlier
    elseif i <= tonumber(stored) then
      ids[i] = id_of(tonumber(time), tonumber(sequence) + i - tonumber(first))
    else
      ids[i] = ''
    end
  end
  return ids
end

-- The ids of messages whose key is remembered, by their index. Their keys are renewed, so that a retry
-- of this call finds them, too. A damaged key is a fault before anything is stored.
local function earlier_ids(name)
  local earlier = {}
  for i = 1, (#ARGV - FIRST + 1) / 4 do
    local at = FIRST + 4 * (i - 1)
    if ARGV[at + 2] ~= '' then
      local key = message_key(name, ARGV[at], ARGV[at + 2])
      earlier[i] = remembered(key)
      if earlier[i] then
        redis.call('PEXPIRE', key, KEY_TTL)
      end
    end
  end
  return earlier
end

-- How many messages the inbox can take.
local function room_in(stream)
  local room = tonumber(ARGV[9]) - redis.call('XLEN', stream)
  local bytes = redis.call('MEMORY', 'USAGE', stream) -- false if there is no stream; an estimate else
  return bytes and bytes >= tonumber(ARGV[11]) and 0 or room
end

-- Stores the messages. Returns their ids and the record of the call: time and sequence of the id of
-- the first message stored, its index, and the index of the last one stored. Later ones have the same
-- time, and a sequence as much higher as their index, so the record stands for all.
local function add(name)
  local stream, ids, set = name .. ':inbox', {}, {}
  local earlier, room = earlier_ids(name), room_in(stream)
  local time, sequence, first, stored = 0, 0, 0, 0
  for i = 1, (#ARGV - FIRST + 1) / 4 do
    local at = FIRST + 4 * (i - 1)
    local user, to, key, json = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
    local key_name = key ~= '' and message_key(name, user, key)
    local known = earlier[i] or key_name and set[key_name]
    if known then
      ids[i] = known
    elseif room <= 0 then
      ids[i] = ''
    else
      local id = first == 0 and '*' or id_of(time, sequence + i - first)
      local fields = {'user', user, 'channel', ARGV[10], 'event', json, 'time', show(now)}
      if to ~= '' then
        fields[#fields + 1], fields[#fields + 2] = 'to', to
      end
      if key_name then
        fields[#fields + 1], fields[#fields + 2] = 'key', key
      end
      ids[i] = redis.call('XADD', stream, id, unpack(fields))
      if first == 0 then
        time, sequence = string.match(ids[i], '^(%d+)-(%d+)$')
        time, sequence, first = tonumber(time), tonumber(sequence), i
        redis.call('PERSIST', stream) -- inbox_stats.lua gives an empty stream an expiry
      end
      room, stored = room - 1, i
      if key_name then
        redis.call('SET', key_name, ids[i], 'PX', KEY_TTL)
        set[key_name] = ids[i]
      end
    end
  end
  return ids, show(time) .. ' ' .. show(sequence) .. ' ' .. first .. ' ' .. stored
end

local function store()
  local name, number = KEYS[1], tonumber(ARGV[6])
  local meta, from = name .. ':meta', 'from:' .. ARGV[5]
  local head, base, _, _, record =
    checked_position(name, epoch, tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), from)
  -- The numbers are needed for retries, also in a channel that never had an event.
  redis.call('PEXPIRE', meta, UNUSED_TTL, 'GT')
  local seconds = show(math.floor(now / 1000))
  if record then
    local last = tonumber(string.match(record, '^(%d+) '))
    if number <= last then
      local ids = number == last and #ARGV >= FIRST and ids_of(name, record)
      if ids then
        return {1, base, head, unpack(ids)}
      end
      return {0, base, head}
    end
  else
    delete_old_numbers(meta, tonumber(seconds) - math.ceil(ARGV[8] / 1000))
  end
  if ARGV[7] == '1' and base ~= tonumber(ARGV[4]) then
    -- The outcome of the first attempt is unknown: its number may have been lost with the old epoch.
    return {0, base, head}
  end
  if #ARGV < FIRST then
    redis.call('HSET', meta, from, ARGV[6] .. ' 0 ' .. seconds)
    return {2, base, head}
  end
  local ids, outcome = add(name)
  redis.call('HSET', meta, from, ARGV[6] .. ' 0 ' .. outcome .. ' ' .. seconds)
  return {1, base, head, unpack(ids)}
end

return guarded(KEYS[1], store)
