-- KEYS[1] P:{C}. ARGV: 1 durable, 2 history ttl in ms, 3 the highest id seen, 4 the base known, 5 first id wanted,
-- 6 last id wanted, 7 at most so many events, 8 about so many bytes (one event at least).
-- Answers {base, head, oldest, event, user or '', event, user or '', ...}, all from one moment.
local epoch = current_epoch(prefix_of(KEYS[1]), ARGV[1] == '1')

local function read()
  local name = KEYS[1]
  local head, base = position(name, epoch, tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]))
  local events = name .. ':events'
  local oldest = redis.call('XRANGE', events, '-', '+', 'COUNT', 1)[1]
  local answer = {base, head, oldest and tonumber(string.match(oldest[1], '^%d+')) or head + 1}

  local next_id, room, bytes = ARGV[5], tonumber(ARGV[7]), tonumber(ARGV[8])
  local CHUNK = 32 -- so that a limit in bytes is overshot by 32 events at most
  while room > 0 and bytes > 0 do
    local found = redis.call('XRANGE', events, next_id, ARGV[6], 'COUNT', math.min(room, CHUNK))
    for _, item in ipairs(found) do
      local fields = item[2]
      answer[#answer + 1] = fields[2]
      answer[#answer + 1] = fields[4] or ''
      bytes = bytes - #fields[2]
    end
    if #found < CHUNK then
      break
    end
    room = room - #found
    next_id = '(' .. found[#found][1]
  end
  return answer
end

return guarded(KEYS[1], read)
