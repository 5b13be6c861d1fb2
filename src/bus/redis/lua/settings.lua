-- KEYS[1] P:settings. ARGV: 1 replace what is there (1 or 0), 2 for how many ms it is kept, then fields and values.
-- Stores the settings of `FCALL fanfare_publish` for this prefix.
local key = KEYS[1]
if ARGV[1] == '1' or redis.call('TYPE', key).ok ~= 'hash' then
  redis.call('DEL', key)
  redis.call('HSET', key, unpack(ARGV, 3))
end
redis.call('PEXPIRE', key, ARGV[2])
return 'OK'
