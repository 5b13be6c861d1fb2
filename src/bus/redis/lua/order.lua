-- Stores a command of a backend to all nodes.
-- KEYS[1] P:{@control}: see `channel_of`
-- ARGV:
--    1 kind of Redis: durable, volatile or cluster
--    2 history ttl in ms
--    3 the highest id seen
--    4 the base known
--    5 'disconnect', 'ban' or 'unban'
--    6 user
--    7 channel or ''
--    8 length of the ban in ms
-- Returns its id, or 0 if as many users as may are banned.
local name = channel_of(KEYS, ARGV)
return guarded(name, function()
  return order(name, tonumber(ARGV[2]), ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], ARGV[6],
    ARGV[7], tonumber(ARGV[8])) or 0
end)
