// Buyers who do not give up: one who gets no answer sends the same request again, with the same key,
// until there is one. Whatever is neither a 202 nor a connection that could not be made fails the
// run; so does a connection that was cut, unless CUT=allowed.
//
//   ITEM_ID, RATE, DURATION, API_URL, RUN   as in loadtest/stampede.js; the stock must do for all

import { check, sleep } from 'k6';
import exec from 'k6/execution';
import { Counter } from 'k6/metrics';
import { journal, outcomeOf, reserve } from './lib/api.js';
import { RUN, arrivals, seconds, text, whole } from './lib/settings.js';

const ITEM_ID = text('ITEM_ID');

// k6's codes of errors between 1210 and 1213 are of connections that were refused, or had no route.
const refusals = new Counter('connections_refused');
const cuts = new Counter('connections_cut');

export const options = {
  scenarios: { persistent: arrivals(whole('RATE', 50), seconds('DURATION', '30s')) },
  thresholds: {
    checks: ['rate==1'],
    answers_5xx: ['count==0'],
    connections_refused: ['count>=0'],
    connections_cut: [__ENV.CUT === 'allowed' ? 'count>=0' : 'count==0'],
  },
};

export default function () {
  const number = exec.scenario.iterationInTest;
  const key = `order-${number}`;
  let outcome;
  for (let attempt = 0; attempt < 100; attempt += 1) {
    const response = reserve(`${RUN}-${number}`, ITEM_ID, 1, key);
    outcome = outcomeOf(response);
    if (outcome === 'accepted') journal(response, key);
    if (outcome !== 'no-answer') break;
    const refused = response.error_code >= 1210 && response.error_code <= 1213;
    (refused ? refusals : cuts).add(1);
    console.warn(`again: ${response.error_code} ${response.error}`);
    sleep(0.5);
  }
  check(outcome, { 'everybody is accepted in the end': () => outcome === 'accepted' });
}
