-- Reads all bans, and the position of the control channel at that moment.
-- KEYS[1] P:{@control}
-- ARGV:
--    1 durable (1 or 0)
--    2 history ttl in ms
--    3 the highest id seen
--    4 the base known
-- Returns {now in ms, base, head, user, end in ms, user, end in ms, ...}.
local now = milliseconds()
local epoch = current_epoch(prefix_of(KEYS[1]), ARGV[1] == '1', now)

return guarded(KEYS[1], function()
  local head, base = checked_position(KEYS[1], epoch, tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]))
  local reply = {now, base, head}
  for i, part in ipairs(redis.call('ZRANGE', bans_key(KEYS[1], now), 0, -1, 'WITHSCORES')) do
    reply[#reply + 1] = i % 2 == 1 and part or tonumber(part)
  end
  return reply
end)
