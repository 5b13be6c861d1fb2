-- KEYS[1] P:{C}. ARGV: 1 durable, 2 history ttl in ms, 3 the highest id seen, 4 the base known, 5 first id wanted,
-- 6 last id wanted, 7 most events, 8 about how many bytes (one event at least), 9 an id: the events from it up to the
-- first id wanted are added, 10 if they have fewer bytes than this, 11 most events in one step.
-- Answers {base, head, oldest, event, user or '', event, user or '', ...}, all from one moment.
local epoch = current_epoch(prefix_of(KEYS[1]), ARGV[1] == '1')

local function read()
  local name = KEYS[1]
  local head, base = position(name, epoch, tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]))
  local events = name .. ':events'
  local oldest = redis.call('XRANGE', events, '-', '+', 'COUNT', 1)[1]
  local answer = {base, head, oldest and tonumber(string.match(oldest[1], '^%d+')) or head + 1}

  -- The size of the longest event so far. A step reads as many events as fit into the limit if all have that size, so
  -- that the limit is exceeded only where sizes differ, and by one step at most.
  local longest = math.max(1, oldest and #oldest[2][2] or 1)
  local step = tonumber(ARGV[11])

  -- Adds the events between two ids to a list, at most `room` of them and about `bytes` bytes. Returns the bytes left.
  local function add(list, from, to, room, bytes)
    while room > 0 and bytes > 0 do
      local count = math.min(room, step, math.ceil(bytes / longest))
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
      room = room - #found
      from = '(' .. found[#found][1]
    end
    return bytes
  end

  local first = tonumber(ARGV[5])
  local before = first - tonumber(ARGV[9])
  local shared = {}
  if before > 0 and add(shared, ARGV[9], show(first - 1), before, tonumber(ARGV[10])) > 0 then
    for _, part in ipairs(shared) do
      answer[#answer + 1] = part
    end
  end
  add(answer, ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8]))
  return answer
end

return guarded(KEYS[1], read)
