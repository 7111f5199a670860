-- wrk's requests, one after the other from a file: a line with the body, a line with its scores.
-- wrk ... -s infer.lua URL -- FILE [check]: with `check` every answer is compared, to the last bit, with the scores its id belongs to;
-- that costs the generator time, so it is left out of the runs that are measured. Prints one line of JSON.
local requests, scores, threads = {}, {}, {}
local at = 0
checked, wrong = 0, 0

function setup(thread)
  table.insert(threads, thread)
  thread:set("first", #threads * 331)
end

local function numbers(text)
  local found = {}
  for number in text:gmatch("[^,%s]+") do
    found[#found + 1] = tonumber(number)
  end
  return found
end

local function right(body)
  local expected = scores[tonumber(body:match('"id"%s*:%s*"(%d+)"') or -1)]
  local data = body:match('"score".-"data"%s*:%s*%[([^%]]*)%]')
  if not expected or not data then
    return false
  end
  local given = numbers(data)
  for n = 1, #expected do
    if given[n] ~= expected[n] then
      return false
    end
  end
  return #given == #expected
end

function init(arguments)
  local number = 0
  local lines = io.lines(arguments[1])
  for body in lines do
    scores[number] = numbers(lines())
    requests[number] = wrk.format("POST", nil, {["Content-Type"] = "application/json"}, body)
    number = number + 1
  end
  at = first % number
  if arguments[2] == "check" then
    response = function(status, _, body)
      checked = checked + 1
      if status ~= 200 or not right(body) then
        wrong = wrong + 1
      end
    end
  end
end

function request()
  at = (at + 1) % (#requests + 1)
  return requests[at]
end

function done(summary, latency)
  local sums = {checked = 0, wrong = 0}
  for _, thread in ipairs(threads) do
    sums.checked = sums.checked + thread:get("checked")
    sums.wrong = sums.wrong + thread:get("wrong")
  end
  local failed = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "not_ok": %d, "broken": %d, "timeouts": %d, "p50_ms": %.3f, "p99_ms": %.3f, "checked": %d, "wrong": %d}\n',
    summary.requests, summary.duration / 1e6, failed.status, failed.connect + failed.read + failed.write, failed.timeout,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000, sums.checked, sums.wrong))
end
