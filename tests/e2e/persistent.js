// Persistent buyers: a buyer without an answer repeats the request with the same key until there is
// one. Any answer except 202 fails the run. Refused connections are allowed. Broken connections are
// allowed only with CUT=allowed. With AWAY=allowed a 503 is repeated, as Retry-After asks.
//
//   ITEM_ID, API_URL, RUN   as in loadtest/stampede.js
//   RATE       buyers per second. If the buyers of four seconds wait, the next ones arrive later.
//   DURATION   how long buyers arrive
//   UNTIL      a refusal that ends the run, such as `paused` or `sold-out`. Without it, the stock must
//              be enough for all buyers.

import { check, sleep } from 'k6';
import exec from 'k6/execution';
import { Counter } from 'k6/metrics';
import { journal, outcomeOf, reserve } from './lib/api.js';
import { RUN, seconds, text, whole } from './lib/settings.js';

const ITEM_ID = text('ITEM_ID');
const RATE = whole('RATE', 50);
const UNTIL = __ENV.UNTIL;
const SECONDS = seconds('DURATION', UNTIL ? '10m' : '30s');
const WAITING = 4 * RATE;

const AWAY = __ENV.AWAY === 'allowed';

// k6's error codes 1210 to 1213 mean that a connection was refused or had no route.
const refusals = new Counter('connections_refused');
const cuts = new Counter('connections_cut');

export const options = {
  scenarios: {
    // An executor with an arrival rate could not end before its time without failing the run.
    persistent: {
      executor: 'per-vu-iterations',
      vus: WAITING,
      maxDuration: `${SECONDS + 60}s`,
    },
  },
  thresholds: {
    checks: ['rate==1'],
    answers_5xx: [AWAY ? 'count>=0' : 'count==0'],
    connections_refused: ['count>=0'],
    connections_cut: [__ENV.CUT === 'allowed' ? 'count>=0' : 'count==0'],
  },
};

/** Buyers arrive one after the other, each at its moment of a constant rate for all VUs. */
export default function () {
  for (let number = exec.vu.idInTest - 1; number < RATE * SECONDS; number += WAITING) {
    const due = exec.scenario.startTime + (1000 * number) / RATE;
    sleep(Math.max(0, due - Date.now()) / 1000);
    const outcome = buy(number);
    if (UNTIL && outcome === UNTIL) break;
    check(outcome, { 'every buyer is accepted in the end': () => outcome === 'accepted' });
  }
}

function buy(number) {
  const key = `order-${number}`;
  let outcome;
  for (let attempt = 0; attempt < 100; attempt += 1) {
    const response = reserve(`${RUN}-${number}`, ITEM_ID, 1, key);
    outcome = outcomeOf(response);
    if (outcome === 'accepted') journal(response, key);
    if (outcome === 'no-answer') {
      const refused = response.error_code >= 1210 && response.error_code <= 1213;
      (refused ? refusals : cuts).add(1);
      console.warn(`retrying after ${response.error_code} ${response.error}`);
    } else if (!AWAY || response.status !== 503) {
      break;
    }
    sleep(0.5);
  }
  return outcome;
}
