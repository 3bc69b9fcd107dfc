// A retry storm: each buyer sends the same order many times, in parallel and in sequence. Each
// buyer must get one reservation.
//
//   ITEM_ID   item, with maxPerUser 1 (required)    STOCK     units available at the start (100)
//   RATE      buyers per second (50)                DURATION  such as 10s, 5m or 1h (10s)
//   COPIES    parallel requests per buyer (4)       AGAIN     repetitions of these requests (2)
//   API_URL, P95_MS, RUN, TOKEN_URL, VUS, MAX_VUS   as in stampede.js
//
// The script prints the same journal as stampede.js.

import { check } from 'k6';
import exec from 'k6/execution';
import http from 'k6/http';
import { Counter } from 'k6/metrics';
import {
  checkAccepted,
  freshSale,
  journal,
  kindOf,
  outcomeOf,
  reserve,
  reserveRequest,
} from './lib/api.js';
import { RUN, arrivals, arrived, seconds, text, thresholds, whole } from './lib/settings.js';

const ITEM_ID = text('ITEM_ID');
const STOCK = whole('STOCK', 100);
const RATE = whole('RATE', 50);
const SECONDS = seconds('DURATION', '10s');
const COPIES = whole('COPIES', 4);
const AGAIN = whole('AGAIN', 2);
const DEMAND = RATE * SECONDS;

const accepted = new Counter('units_accepted');
const refused = new Counter('buyers_refused');

export const options = {
  batch: COPIES, // k6's default is 20 parallel requests, and six per host
  batchPerHost: COPIES,
  scenarios: { retryStorm: arrivals(RATE, SECONDS) },
  thresholds: thresholds({
    ...arrived(DEMAND),
    ...(DEMAND >= STOCK
      ? { units_accepted: [`count==${STOCK}`] }
      : { units_accepted: [`count<=${STOCK}`], buyers_refused: ['count==0'] }),
  }),
};

export function setup() {
  freshSale(ITEM_ID, STOCK);
}

export default function () {
  const userId = `${RUN}-${exec.scenario.iterationInTest}`;
  const key = `order-${userId}`;
  const copies = Array.from({ length: COPIES }, () => reserveRequest(userId, ITEM_ID, 1, key));
  const outcomes = new Set();
  const ids = new Set();
  let first;
  for (let repetition = 0; repetition <= AGAIN; repetition += 1) {
    for (const response of http.batch(copies)) {
      const outcome = outcomeOf(response);
      outcomes.add(outcome);
      if (outcome === 'accepted') {
        first = first || response;
        ids.add(response.json('reservationId'));
      }
    }
  }
  check(outcomes, { 'all copies get the same answer': () => outcomes.size === 1 });
  if (!first) {
    refused.add(1);
    check(outcomes, { 'a refusal is sold-out': () => outcomes.has('sold-out') });
    return;
  }
  accepted.add(1);
  journal(first, key);
  checkAccepted(first, userId, ITEM_ID, 1);
  const other = reserve(userId, ITEM_ID, 2, key);
  check(other, {
    'all copies get the same reservation': () => ids.size === 1,
    'the same key with another quantity is refused': () =>
      other.status === 422 && kindOf(other) === 'key-reused',
  });
}
