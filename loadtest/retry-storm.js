// A retry storm: buyers send the same order many times, at once and again. It is one order.
//
//   ITEM_ID   what is sold, one a buyer (required)  STOCK     units available at the start (100)
//   RATE      buyers a second (50)                  DURATION  10s, 5m, 1h (10s)
//   COPIES    requests of a buyer at once (4)       AGAIN     times they are repeated (2)
//   API_URL, P95_MS, RUN, VUS, MAX_VUS              as in stampede.js
//
// The journal on the console is that of stampede.js.

import { check } from 'k6';
import exec from 'k6/execution';
import http from 'k6/http';
import { Counter } from 'k6/metrics';
import { checkAccepted, freshSale, journal, kindOf, outcomeOf, reserve, wanted } from './lib/api.js';
import { RUN, arrivals, seconds, text, thresholds, whole } from './lib/settings.js';

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
  batchPerHost: COPIES, // else k6 sends six at once
  scenarios: { retryStorm: arrivals(RATE, SECONDS) },
  thresholds: thresholds(
    DEMAND >= STOCK
      ? { units_accepted: [`count==${STOCK}`] }
      : { units_accepted: [`count<=${STOCK}`], buyers_refused: ['count==0'] },
  ),
};

export function setup() {
  freshSale(ITEM_ID, STOCK);
}

export default function () {
  const userId = `${RUN}-${exec.scenario.iterationInTest}`;
  const key = `order-${userId}`;
  const copies = Array.from({ length: COPIES }, () => wanted(userId, ITEM_ID, 1, key));
  const outcomes = new Set();
  const ids = new Set();
  let first;
  for (let turn = 0; turn <= AGAIN; turn += 1) {
    for (const response of http.batch(copies)) {
      const outcome = outcomeOf(response);
      outcomes.add(outcome);
      if (outcome === 'accepted') {
        first = first || response;
        ids.add(response.json('reservationId'));
      }
    }
  }
  check(outcomes, { 'every copy is answered alike': () => outcomes.size === 1 });
  if (!first) {
    refused.add(1);
    check(outcomes, { 'a refusal is sold out': () => outcomes.has('sold-out') });
    return;
  }
  accepted.add(1);
  journal(first, key);
  checkAccepted(first, userId, ITEM_ID, 1);
  const other = reserve(userId, ITEM_ID, 2, key);
  check(other, {
    'all copies are one reservation': () => ids.size === 1,
    'the key with another quantity is refused': () =>
      other.status === 422 && kindOf(other) === 'key-reused',
  });
}
