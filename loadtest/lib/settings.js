// Settings from the environment. An invalid setting aborts the run before its first request.

/** Return a required text. */
export function text(name) {
  const value = __ENV[name];
  if (!value) throw new Error(`set ${name}: see the comment at the top of the script`);
  return value;
}

/** Return an integer from 1 to 100,000,000, the largest stock. */
export function whole(name, byDefault) {
  const value = __ENV[name] || `${byDefault}`;
  if (!/^[1-9][0-9]*$/.test(value) || Number(value) > 100000000) {
    throw new Error(`${name} must be an integer from 1 to 100000000, not ${value}`);
  }
  return Number(value);
}

/** Return a duration such as 90s, 5m or 1h in seconds. It is at most 1000h. */
export function seconds(name, byDefault) {
  const value = __ENV[name] || byDefault;
  const match = /^([1-9][0-9]*)([smh])$/.exec(value);
  const found = match ? Number(match[1]) * { s: 1, m: 60, h: 3600 }[match[2]] : Infinity;
  if (found > 1000 * 3600) {
    throw new Error(`${name} must be a duration such as 90s, 5m or 1h up to 1000h, not ${value}`);
  }
  return found;
}

export const API_URL = (__ENV.API_URL || 'http://localhost:8080').replace(/\/$/, '');

/** Prefix of the user ids and keys of this run, so that two runs do not share users. */
export const RUN = __ENV.RUN || `${Date.now()}`;

/**
 * Return a scenario in which buyers arrive at a constant rate. A slow answer does not delay the
 * next buyer. If all MAX_VUS connections wait, k6 drops buyers: see `arrived`.
 */
export function arrivals(rate, durationSeconds) {
  return {
    executor: 'constant-arrival-rate',
    rate,
    timeUnit: '1s',
    duration: `${durationSeconds}s`,
    preAllocatedVUs: whole('VUS', 100),
    maxVUs: whole('MAX_VUS', 1000),
  };
}

/** Return the threshold that 90 % of the buyers arrive. Otherwise late answers reduced the load. */
export function arrived(buyers) {
  return { dropped_iterations: [`count<=${Math.floor(buyers / 10)}`] };
}

/** Return the thresholds of all scripts and a script's own. P95_MS (milliseconds) adds latency. */
export function thresholds(own) {
  const all = {
    checks: ['rate==1'],
    answers_5xx: ['count==0'],
    answers_none: ['count==0'],
    ...own,
  };
  if (__ENV.P95_MS) all['http_req_duration{name:reserve}'] = [`p(95)<${whole('P95_MS')}`];
  return all;
}
