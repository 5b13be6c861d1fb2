-- Reads a channel's position and a part of its history, all from one moment.
-- KEYS[1] P:{C}: see `channel_of`
-- ARGV:
--    1 kind of Redis: durable, volatile or cluster
--    2 history ttl in ms
--    3 the highest id seen
--    4 the base known
--    5 first id
--    6 last id
--    7 most events
--    8 about how many bytes; at least one event is returned
--    9 an id up to the first one: the events between them are returned, too,
--    10 if they have fewer bytes than this
--    11 most events in one step
-- Returns {base, head, oldest, event, user or '', event, user or '', ...}.
local name = channel_of(KEYS, ARGV)
local epoch = current_epoch(prefix_of(name), ARGV[1], milliseconds())

local function read()
  local head, base = checked_position(name, epoch, tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]))
  local events = name .. ':events'
  local oldest = redis.call('XRANGE', events, '-', '+', 'COUNT', 1)[1]
  local reply = {base, head, oldest and tonumber(string.match(oldest[1], '^%d+')) or head + 1}

  -- The size of the longest event so far. A step reads as many events of that size as fit into the
  -- limit, so the limit is exceeded only where sizes differ, and by at most one step.
  local longest = math.max(1, oldest and #oldest[2][2] or 1)
  local step = tonumber(ARGV[11])

  -- Adds the events between two ids to a list, at most `limit` of them and about `bytes` bytes.
  -- Returns the bytes left.
  local function add(list, from, to, limit, bytes)
    while limit > 0 and bytes > 0 do
      local count = math.min(limit, step, math.ceil(bytes / longest))
      local found = redis.call('XRANGE', events, from, to, 'COUNT', count)
      for _, item in ipairs(found) do
        local fields = item[2]
        list[#list + 1] = fields[2]
        list[#list + 1] = fields[4] or ''
        bytes = bytes - #fields[2]
        longest = math.max(longest, #fields[2])
      end
      if #found < count then
        break
      end
      limit = limit - #found
      from = '(' .. found[#found][1]
    end
    return bytes
  end

  local first = tonumber(ARGV[5])
  local before = first - tonumber(ARGV[9])
  local shared = {}
  if before > 0 and add(shared, ARGV[9], show(first - 1), before, tonumber(ARGV[10])) > 0 then
    for _, part in ipairs(shared) do
      reply[#reply + 1] = part
    end
  end
  add(reply, ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8]))
  return reply
end

return guarded(name, read)
