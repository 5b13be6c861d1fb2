-- KEYS[1] the node's own Pub/Sub channel. ARGV: 1 durable, 2 history ttl in ms, 3 prefix, 4 number of the canary,
-- then for each followed channel: its name, the highest id seen, the base known.
-- Publishes the number and a line "name base head" for each channel, and renews their expiry. If a channel's data is
-- wrong, its line is "name FAULT key: text".
local ttl = tonumber(ARGV[2])
local epoch = current_epoch(ARGV[3], ARGV[1] == '1') -- even without channels, so that a promotion is seen in time

local function compare(name, seen, known)
  local head, base = position(name, epoch, ttl, tonumber(seen), tonumber(known))
  local meta, keep = name .. ':meta', 2 * ttl
  if head == base and redis.call('PTTL', meta) <= UNUSED then
    keep = math.min(UNUSED, keep) -- it still had no event
  end
  redis.call('PEXPIRE', meta, keep)
  return show(base) .. ' ' .. show(head)
end

local lines = {ARGV[4]}
for i = 5, #ARGV, 3 do
  local name = ARGV[3] .. ':{' .. ARGV[i] .. '}'
  local line = guarded(name, compare, name, ARGV[i + 1], ARGV[i + 2])
  lines[#lines + 1] = ARGV[i] .. ' ' .. (line.err or line)
end
return redis.call('PUBLISH', KEYS[1], table.concat(lines, '\n'))
