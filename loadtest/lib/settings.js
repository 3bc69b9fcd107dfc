// Settings from the environment. A wrong one ends the run before the first request.

/** A required text. */
export function text(name) {
  const value = __ENV[name];
  if (!value) throw new Error(`set ${name}: see the head of the script`);
  return value;
}

/** A whole number of at least 1. */
export function whole(name, byDefault) {
  const value = __ENV[name] || `${byDefault}`;
  if (!/^[1-9][0-9]*$/.test(value)) throw new Error(`${name} is a whole number of 1 or more: ${value}`);
  return Number(value);
}

/** A duration in seconds: 90s, 5m or 1h. */
export function seconds(name, byDefault) {
  const value = __ENV[name] || byDefault;
  const match = /^([1-9][0-9]*)([smh])$/.exec(value);
  if (!match) throw new Error(`${name} is a duration such as 90s, 5m or 1h: ${value}`);
  return Number(match[1]) * { s: 1, m: 60, h: 3600 }[match[2]];
}

export const API_URL = (__ENV.API_URL || 'http://localhost:8080').replace(/\/$/, '');

/** Tells the users and keys of this run from those of another. */
export const RUN = __ENV.RUN || `${Date.now()}`;

/**
 * A crowd that arrives at a constant rate, whatever the API does: a slow answer does not keep the
 * next buyer away, so no latency hides in requests that were never sent.
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

/** The thresholds that every script has; latency only if P95_MS (milliseconds) is set. */
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
