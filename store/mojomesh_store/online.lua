-- Merge rows into entries of the online store. The whole script is one step for everybody else, so nobody's rows are lost between a
-- read and a write, and of two rows with one event time the later known stays, in whatever order they arrive.
--
-- KEYS: the generation, then the entries. ARGV: rows kept per entry; a new generation, should there be none; milliseconds that rows of a
-- write live in an entry that no load made whole; then for each entry: its name; from which event time on the loaded rows are all there
-- are, or '' when they come from a write; the lease they were loaded under; when they were loaded and how long it took (both ms);
-- milliseconds to live; the number of rows; the rows.
-- Answers the lease of each entry. What was loaded is kept only if the entry has been there ever since the lease was taken, so that it
-- has the rows of every write meanwhile: one that was evicted, and made again by the next write, has not.
-- An entry is `<sha1 of the rest>\n<name>\t<generation>\t<complete from>\t<loaded at>\t<load ms>\n` and a line per row, newest first:
-- `<event time>\t<created at>\t<seq>\t<reported at>\t<values as JSON>\n`; times are microseconds, exact in a double. Rows before
-- `complete from` are left out; an entry that no load has made whole (loaded at 0, and then when it was made) may lack later ones too.

local EVER = -9007199254740992 -- -2^53
local kept = tonumber(ARGV[1])

local function later(a, b)
  if a.event ~= b.event then return a.event > b.event end
  if a.created ~= b.created then return a.created > b.created end
  return a.seq > b.seq
end

local function add_line(rows, line)
  local event, created, seq = line:match('^(%-?%d+)\t(%-?%d+)\t(%d+)\t')
  if not event then return end
  local row = {event = tonumber(event), created = tonumber(created), seq = tonumber(seq), line = line}
  local known = rows[row.event]
  if not known or later(row, known) then rows[row.event] = row end
end

local function read(key, name, generation, rows)
  local value = redis.pcall('GET', key)
  if type(value) ~= 'string' then return nil end
  local digest, body = value:match('^(%x+)\n(.*)$')
  if not digest or redis.sha1hex(body) ~= digest then return nil end
  local head, lines = body:match('^([^\n]*)\n(.*)$')
  if not head then return nil end
  local its_name, its_generation, complete_from, loaded_at, load_ms = head:match('^([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)$')
  if its_name ~= name or its_generation ~= generation or not tonumber(complete_from) then return nil end
  for line in lines:gmatch('[^\n]+') do add_line(rows, line) end
  return {complete_from = tonumber(complete_from), loaded_at = loaded_at, load_ms = load_ms}
end

-- The lines of the newest rows; what is left out is told by the entry's `complete_from`.
local function kept_lines(rows, entry)
  local ordered, lines = {}, {}
  for _, row in pairs(rows) do
    if row.event >= entry.complete_from then ordered[#ordered + 1] = row end
  end
  table.sort(ordered, later)
  for index, row in ipairs(ordered) do
    if index > kept then
      -- Not one above the row left out: that one is the answer up to the next.
      entry.complete_from = ordered[kept].event
      break
    end
    lines[index] = row.line .. '\n'
  end
  return lines
end

local generation = redis.pcall('GET', KEYS[1])
if type(generation) ~= 'string' or not generation:match('^[%x-]+$') then
  generation = ARGV[2]
  redis.call('SET', KEYS[1], generation)
end

local function lease_of(entry) return entry.loaded_at .. ' ' .. entry.load_ms end

local now = table.concat(redis.call('TIME'), '.')
local leases = {}
local position = 4
for n = 2, #KEYS do
  local name, complete_from, lease, loaded_at, load_ms, time_to_live = unpack(ARGV, position, position + 5)
  local n_rows, first = tonumber(ARGV[position + 6]), position + 7
  position = first + n_rows
  local loaded = complete_from ~= ''
  local rows = {}
  local entry = read(KEYS[n], name, generation, rows)
  local fresh = not entry
  entry = entry or {complete_from = EVER, loaded_at = '0', load_ms = now}
  if not loaded or (not fresh and lease == lease_of(entry)) then
    local was_whole = entry.loaded_at ~= '0'
    if loaded then
      -- Rows that were left out since the load began are not in what it loaded: what was incomplete so far back stays so.
      entry = {complete_from = math.max(entry.complete_from, tonumber(complete_from)), loaded_at = loaded_at, load_ms = load_ms}
    end
    local lines = {}
    if fresh and n_rows <= 1 then -- as most writes are: nobody has asked for the entity
      if n_rows == 1 then lines[1] = ARGV[first] .. '\n' end
    else
      for index = first, first + n_rows - 1 do add_line(rows, ARGV[index]) end
      lines = kept_lines(rows, entry)
    end
    local body = table.concat({name, generation, string.format('%.0f', entry.complete_from), entry.loaded_at, entry.load_ms}, '\t')
      .. '\n' .. table.concat(lines)
    local value = redis.sha1hex(body) .. '\n' .. body
    if loaded then
      redis.call('SET', KEYS[n], value, 'PX', time_to_live)
    elseif was_whole then
      redis.call('SET', KEYS[n], value, 'KEEPTTL')
    else
      redis.call('SET', KEYS[n], value, 'PX', ARGV[3])
    end
  end
  leases[n - 1] = lease_of(entry)
end
return leases
