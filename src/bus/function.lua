-- FCALL fanfare_publish 1 P:{C} <JSON object> [to]: what a node's publish does, for any program.
-- SETTINGS stands before this text: bare (a set of channel names), max, history, ttl (in ms), durable.

local CONTROL = {welcome = true, reset = true, ping = true, error = true, ack = true}

-- Redis's JSON decoder takes any bytes, but WebSocket text must be UTF-8 (RFC 3629).
local function is_utf8(text)
  local at = string.find(text, '[\128-\255]')
  while at do
    local lead, second = string.byte(text, at, at + 1)
    local tail, low, high
    if lead >= 0xC2 and lead <= 0xDF then tail, low, high = 1, 0x80, 0xBF
    elseif lead == 0xE0 then tail, low, high = 2, 0xA0, 0xBF
    elseif lead == 0xED then tail, low, high = 2, 0x80, 0x9F
    elseif lead >= 0xE1 and lead <= 0xEF then tail, low, high = 2, 0x80, 0xBF
    elseif lead == 0xF0 then tail, low, high = 3, 0x90, 0xBF
    elseif lead >= 0xF1 and lead <= 0xF3 then tail, low, high = 3, 0x80, 0xBF
    elseif lead == 0xF4 then tail, low, high = 3, 0x80, 0x8F
    else return false end
    if not second or second < low or second > high then return false end
    for i = at + 2, at + tail do
      local byte = string.byte(text, i)
      if not byte or byte < 0x80 or byte > 0xBF then return false end
    end
    at = string.find(text, '[\128-\255]', at + tail + 1)
  end
  return true
end

local function is_user_id(name)
  return #name >= 1 and #name <= 128 and is_utf8(name)
    and not string.find(name, '[%z\1-\31\127]') and not string.find(name, '\194[\128-\159]')
end

local function refuse(text)
  return redis.error_reply('ERR fanfare_publish: ' .. text)
end

local function publish(keys, args)
  local name = keys[1]
  local channel = name and string.match(name, '^[^{}]+:{([%w_.:-]+)}$')
  if #keys ~= 1 or not channel or #channel > 128 then
    return refuse('give one key, <prefix>:{<channel>}, as in FCALL fanfare_publish 1 fanfare:{ws_broadcast} ...')
  end
  if #args < 1 or #args > 2 then
    return refuse('give a JSON object and, for one user alone, the user id')
  end
  local text = args[1]
  if #text > SETTINGS.max then
    return refuse('the event has ' .. #text .. ' bytes; --max-message allows ' .. SETTINGS.max)
  end
  -- One event, one line. In JSON such bytes can only be blanks, or wrong.
  text = string.gsub(text, '[%z\1-\31]', ' ')
  local first, last = string.find(text, '[^ ]'), #text
  while first and string.byte(text, last) == 32 do last = last - 1 end
  text = string.sub(text, first or 1, last)
  -- A decoder of its own, as strict as clients are: no NaN, no hexadecimal.
  local json = cjson.new()
  json.decode_invalid_numbers(false)
  local valid, event = pcall(json.decode, text)
  if not valid or type(event) ~= 'table' or string.sub(text, 1, 1) ~= '{' or not is_utf8(text) then
    return refuse('the event must be one JSON object in UTF-8')
  end
  if event.id ~= nil or event.to ~= nil then
    return refuse('"id" and "to" are reserved: the id is given here, and the user is the argument after the event')
  end
  if type(event.type) == 'string' and CONTROL[event.type] then
    return refuse('the type "' .. event.type .. '" is reserved for control frames; use another')
  end
  local user = args[2] or ''
  if args[2] and not is_user_id(user) then
    return refuse('a user id has 1 to 128 bytes of UTF-8 and no control characters')
  end
  local item = string.sub(text, 1, -2) .. (next(event) ~= nil and ',' or '')
  if user ~= '' then
    item = item .. '"to":' .. cjson.encode(user) .. ','
  end

  local epoch = current_epoch(prefix_of(name), SETTINGS.durable)
  local head = position(name, epoch, SETTINGS.ttl, 0, 0)
  local messages
  head, messages = append(name, head, {item .. '"id":', user}, 1, SETTINGS.history, SETTINGS.ttl)
  announce(name, messages, SETTINGS.bare[channel] and channel or '')
  return head
end

redis.register_function('fanfare_publish', function(keys, args)
  return guarded(keys[1], publish, keys, args)
end)
