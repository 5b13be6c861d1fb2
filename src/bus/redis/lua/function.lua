-- The functions for other programs:
-- FCALL fanfare_publish 1 P:{C} <JSON object> [to] [idempotency key] publishes an event.
-- FCALL fanfare_disconnect 1 P:{@control} <user> [channel] [seconds] closes a user's connections.
-- FCALL fanfare_unban 1 P:{@control} <user> ends a ban.
-- VERSION is defined before this text. The settings of a prefix are in the hash P:settings, which
-- its nodes write.

local CONTROL = {
  welcome = true, reset = true, ping = true, error = true, ack = true, unsubscribed = true, token_expiring = true, presence = true,
}

-- The JSON that an event may hold: I-JSON (RFC 7493), as in src/protocol/json. cjson accepts more: numbers
-- like 1. and -.5, repeated names, control characters in strings. These are found in the text
-- without its strings.
local DEPTH_MAX, NUMBER_MAX = 64, 128

-- Created by the first call: cjson and string are unavailable while a library is loaded.
local decoder, too_long
local function prepare()
  decoder = cjson.new()
  decoder.decode_max_depth(DEPTH_MAX)
  decoder.decode_invalid_numbers(false) -- no NaN, no hexadecimal
  too_long = '%f[%d-]' .. string.rep('[%d.eE+-]', NUMBER_MAX + 1)
end

-- Whether a text is UTF-8 (RFC 3629): removes its sequences and checks that no other byte is left.
local function is_utf8(text)
  if string.find(text, '^[%z\1-\127]*$') then
    return true
  end
  local rest = string.gsub(text, '[%z\1-\127]+', ' ')
  rest = string.gsub(rest, '[\194-\223][\128-\191]', ' ')
  if not string.find(rest, '[\128-\255]') then
    return true
  end
  -- Not overlong, no surrogates, nothing beyond U+10FFFF.
  if string.find(rest, '\224[\128-\159]') or string.find(rest, '\237[\160-\191]')
    or string.find(rest, '\240[\128-\143]') or string.find(rest, '\244[\144-\191]') then
    return false
  end
  rest = string.gsub(rest, '[\224-\239][\128-\191][\128-\191]', ' ')
  rest = string.gsub(rest, '[\240-\244][\128-\191][\128-\191][\128-\191]', ' ')
  return not string.find(rest, '[\128-\255]')
end

-- Subtracts the members of all objects in a decoded value from `left`, their number in the text.
-- The rest is above 0 if a name is repeated. Stops at 0, so that arrays without objects are not
-- searched. (A decoded object has no [1].)
local function members_left(value, left)
  if value[1] == nil then
    for _ in pairs(value) do left = left - 1 end
  end
  if left > 0 then
    for _, item in pairs(value) do
      if type(item) == 'table' then
        left = members_left(item, left)
        if left == 0 then break end
      end
    end
  end
  return left
end

-- What is wrong with the numbers of a JSON text without strings, or nil.
local function bad_numbers(text)
  if #text > NUMBER_MAX and string.find(text, too_long) then
    return 'a number has more than ' .. NUMBER_MAX .. ' characters'
  end
  if string.find(text, '.', 1, true) and (string.find(text, '%D%.') or string.find(text, '%.%D')) then
    return 'not JSON (RFC 8259)'
  end
  if string.find(text, '%d[eE]') then
    for number in string.gmatch(text, '%f[%d.][%d.]+[eE][%d+-]+') do
      if tonumber(number) == math.huge then
        return 'a number is too large for a double'
      end
    end
  end
end

-- The value of a JSON text, or nil and what is wrong with it. `printable`: only printable ASCII.
local function decode(text, printable)
  if not printable and not is_utf8(text) then
    return nil, 'not UTF-8'
  end
  if not decoder then prepare() end
  local valid, value = pcall(decoder.decode, text)
  if not valid then
    if string.find(value, 'too many nested', 1, true) then
      return nil, 'an event has more than ' .. DEPTH_MAX .. ' levels of arrays and objects'
    elseif string.find(value, 'unicode escape', 1, true) then
      return nil, 'not JSON (RFC 8259), or a \\u escape is half of a surrogate pair'
    end
    return nil, 'not JSON (RFC 8259)'
  end
  local rest = text
  if string.find(rest, '\\', 1, true) then
    rest = string.gsub(rest, '\\.', '')
  end
  -- A string with a control character stays, with its quotes. The first pattern is faster.
  rest = string.gsub(rest, printable and '%b""' or '"[^"%z\1-\31]*"', '')
  if string.find(rest, '"', 1, true) or string.find(rest, '\0', 1, true) then
    return nil, 'not JSON (RFC 8259)'
  end
  local fault_text = string.find(rest, '%d') and bad_numbers(rest)
  if fault_text then
    return nil, fault_text
  end
  local _, colons = string.gsub(rest, ':', '')
  if colons > 0 and members_left(value, colons) > 0 then
    return nil, 'an object has two members of the same name'
  end
  return value
end

local function is_user_id(name)
  return #name >= 1 and #name <= 128 and is_utf8(name)
    and not string.find(name, '[%z\1-\31\127]') and not string.find(name, '\194[\128-\159]')
end

-- A function that returns an error of this FCALL.
local function rejecting(name)
  return function(text)
    return redis.error_reply('ERR ' .. name .. ': ' .. text)
  end
end

local FIELDS = {'max_message_size', 'history', 'history_ttl', 'durable', 'pubsub_channels', 'history_bytes'}

-- On a Redis Cluster no key is in the slots of every channel. There the nodes call fanfare_settings on
-- each primary, and this table holds the fields by prefix, as long as the library is loaded.
local of_cluster = {}

local function set_settings(_, args)
  if not redis.acl_check_cmd('HSET', args[1] .. ':settings', 'x', 'x') then
    return redis.error_reply('NOPERM this user may not write the settings of this prefix')
  end
  if args[2] == '1' or not of_cluster[args[1]] then
    local fields = {}
    for i = 3, #args, 2 do fields[args[i]] = args[i + 1] end
    of_cluster[args[1]] = fields
  end
  return redis.status_reply('OK')
end

-- The settings of the nodes of a prefix, or nil and the reason.
local function settings_of(prefix)
  local key, found, kind = prefix .. ':settings', {}, nil
  if of_cluster[prefix] then
    kind = 'cluster'
    for i, field in ipairs(FIELDS) do found[i] = of_cluster[prefix][field] end
  else
    found = redis.pcall('HMGET', key, unpack(FIELDS))
    if found.err and (string.find(found.err, 'non local key', 1, true) or string.find(found.err, 'same slot', 1, true)) then
      found = {} -- a cluster
    elseif found.err then
      return nil, "can't read " .. key .. ': ' .. found.err
    end
  end
  local settings = {
    max = tonumber(found[1]), history = tonumber(found[2]), ttl = tonumber(found[3]),
    kind = kind or found[4] == '1' and 'durable' or 'volatile', pubsub_channels = ' ' .. (found[5] or '') .. ' ', bytes = tonumber(found[6]),
  }
  if not (settings.max and settings.history and settings.ttl and settings.bytes) then
    return nil, 'no node has the --redis-prefix "' .. prefix .. '" (the key ' .. key .. ' is missing)'
  end
  return settings
end

local function publish(keys, args)
  local reject = rejecting('fanfare_publish')
  local name = keys[1]
  local prefix, channel = string.match(name or '', '^([^{}]+):{([%w_.:-]+)}$')
  if #keys ~= 1 or not channel or #channel > 128 then
    return reject('give one key, <prefix>:{<channel>}, as in FCALL fanfare_publish 1 fanfare:{ws_broadcast} ...')
  end
  if #args < 1 or #args > 3 then
    return reject('give a JSON object, then optionally a user id (empty for all subscribers) and an idempotency key')
  end
  local settings, why = settings_of(prefix)
  if not settings then
    return reject(why)
  end
  local text = args[1]
  if #text > settings.max then
    return reject('the event has ' .. #text .. ' bytes; --max-message-size allows ' .. settings.max)
  end
  local printable = string.find(text, '^[ -~]*$')
  local event, invalid = decode(text, printable)
  if invalid then
    return reject('invalid event: ' .. invalid)
  end
  if not printable then
    -- One event is one line. Line breaks occur outside strings only.
    text = string.gsub(text, '[\t\r\n]', ' ')
  end
  text = string.match(text, '^ *(.*)$')
  local last = #text
  while string.byte(text, last) == 32 do last = last - 1 end
  if type(event) ~= 'table' or string.byte(text) ~= 123 then -- {
    return reject('the event must be a JSON object')
  end
  if event.id ~= nil or event.to ~= nil then
    return reject('"id" and "to" are reserved: the id is given here, and the user is the argument after the event')
  end
  if type(event.type) == 'string' and CONTROL[event.type] then
    return reject('the type "' .. event.type .. '" is reserved for control frames; use another')
  end
  local user = args[2] or ''
  if args[2] and not (user == '' and args[3]) and not is_user_id(user) then
    return reject('a user id has 1 to 128 bytes of UTF-8 and no control characters')
  end
  if args[3] and (#args[3] < 1 or #args[3] > 128 or string.find(args[3], '[^\33\35-\126]')) then
    return reject('an idempotency key has 1 to 128 printable ASCII characters without blanks and quotes')
  end
  local to = user ~= '' and '"to":' .. cjson.encode(user) .. ',' or ''
  local item = string.sub(text, 1, last - 1) .. (next(event) ~= nil and ',' or '') .. to .. '"id":'

  local now = milliseconds()
  local epoch, is_copied = current_epoch(prefix, settings.kind, now)
  local head, _, bytes, kept = checked_position(name, epoch, settings.ttl, 0, 0)
  local key = args[3] and key_name(name, args[3])
  local earlier = key and published_with(name, key)
  if earlier then
    return earlier
  end
  local messages
  head, messages = append(name, head, bytes, kept, {user, 1, item}, 1, settings, now, {})
  if key then
    redis.call('SET', key, show(head), 'PX', KEY_TTL)
  end
  local is_pubsub = string.find(settings.pubsub_channels, ' ' .. channel .. ' ', 1, true)
  publish_messages(name, messages, is_pubsub and channel or '', is_copied)
  return head
end

-- What a text is that should be a user id, a channel and the seconds of a ban, or nil.
local function wrong_argument(user, channel, seconds)
  if not is_user_id(user) then
    return 'a user id has 1 to 128 bytes of UTF-8 and no control characters'
  elseif channel ~= '' and (#channel > 128 or not string.find(channel, '^[%w_.:-]+$')) then
    return 'a channel has 1 to 128 of A-Z a-z 0-9 _ . : -'
  elseif seconds ~= '' and not (string.find(seconds, '^%d+$') and tonumber(seconds) >= 1
    and tonumber(seconds) * 1000 <= BAN_MAX) then
    return 'a ban is a number of seconds from 1 to ' .. BAN_MAX / 1000
  elseif channel ~= '' and seconds ~= '' then
    return 'a ban is for all channels: leave the channel empty, or the seconds out'
  end
end

-- Stores a command for the nodes of the prefix in `key`. Returns its id.
local function order_by(reject, key, action, user, channel, seconds)
  local prefix = string.match(key or '', '^([^{}]+):{@control}$')
  if not prefix then
    return reject('give one key, <prefix>:{@control}, as in fanfare:{@control}')
  end
  local wrong = wrong_argument(user, channel, seconds)
  if wrong then
    return reject(wrong)
  end
  local settings, why = settings_of(prefix)
  if not settings then
    return reject(why)
  end
  local id = order(key, settings.ttl, settings.kind, 0, 0, action, user, channel, (tonumber(seconds) or 0) * 1000)
  return id or reject(BANS_MAX .. ' users are banned, the most at a time: unban some')
end

local function disconnect(keys, args)
  local reject = rejecting('fanfare_disconnect')
  if #keys ~= 1 or #args < 1 or #args > 3 then
    return reject('give one key, then a user id, and optionally a channel (empty for all) and the seconds of a ban')
  end
  local channel, seconds = args[2] or '', args[3] or ''
  return order_by(reject, keys[1], seconds ~= '' and 'ban' or 'disconnect', args[1], channel, seconds)
end

local function unban(keys, args)
  local reject = rejecting('fanfare_unban')
  if #keys ~= 1 or #args ~= 1 then
    return reject('give one key, then a user id')
  end
  return order_by(reject, keys[1], 'unban', args[1], '', '')
end

local function register(name, work)
  redis.register_function{
    function_name = name,
    description = VERSION,
    callback = function(keys, args)
      return guarded(keys[1], work, keys, args)
    end,
  }
end

register('fanfare_publish', publish)
register('fanfare_disconnect', disconnect)
register('fanfare_unban', unban)
redis.register_function{
  function_name = 'fanfare_settings',
  description = VERSION,
  flags = {'no-writes', 'allow-oom'},
  callback = set_settings,
}
