-- KEYS[1] P:{C}. ARGV: 1 durable (1 or 0), 2 history ttl in ms, 3 the highest id seen, 4 the base known,
-- 5 history length, 6 the bare channel or '', 7 node, 8 number of the call, 9 retry (1 or 0),
-- 10 for how many ms the number is remembered, then pairs: text up to the id's digits, user or ''.
-- Answers {1, first id, base, head}, or {0, 0, base, head}: it may or may not have been taken, and won't be now.
local epoch = current_epoch(prefix_of(KEYS[1]), ARGV[1] == '1')

local function publish()
  local name = KEYS[1]
  local ttl = tonumber(ARGV[2])
  local number, known = tonumber(ARGV[8]), tonumber(ARGV[4])
  local head, base = position(name, epoch, ttl, tonumber(ARGV[3]), known)

  local from = name .. ':from:' .. ARGV[7]
  local stored = redis.call('GET', from)
  if stored then
    local last, first, since = string.match(stored, '^(%d+) (%d+) (%d+)$')
    if number <= tonumber(last) then
      if number == tonumber(last) and tonumber(since) == base then
        return {1, tonumber(first), base, head}
      end
      return {0, 0, base, head}
    end
  end
  if ARGV[9] == '1' and base ~= known then
    -- Whether the first attempt was taken can't be told any more: its traces may be gone with the old run.
    return {0, 0, base, head}
  end

  local first = head + 1
  local messages
  head, messages = append(name, head, ARGV, 11, ARGV[5], ttl)
  redis.call('SET', from, ARGV[8] .. ' ' .. show(first) .. ' ' .. show(base), 'PX', ARGV[10])
  announce(name, messages, ARGV[6])
  return {1, first, base, head}
end

return guarded(KEYS[1], publish)
