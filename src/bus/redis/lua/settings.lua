-- Stores the settings of `FCALL fanfare_publish` for a prefix.
-- KEYS[1] P:settings. ARGV: 1 replace existing settings (1 or 0), 2 their expiry in ms, then fields
-- and values.
local key = KEYS[1]
if ARGV[1] == '1' or redis.call('TYPE', key).ok ~= 'hash' then
  redis.call('DEL', key)
  redis.call('HSET', key, unpack(ARGV, 3))
end
redis.call('PEXPIRE', key, ARGV[2])
return 'OK'
