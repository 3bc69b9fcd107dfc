// A stampede: many buyers arrive at once, and each sends one request for one unit. The engine must
// sell exactly the stock.
//
//   ITEM_ID   item (required)                  STOCK     units available at the start (100)
//   RATE      buyers per second (400)          DURATION  such as 10s, 5m or 1h (10s)
//   API_URL   (http://localhost:8080)          P95_MS    fail above this 95th percentile (none)
//   RUN       prefix of user ids (the time)    VUS       connections at the start (100)
//   TOKEN_URL answers ?sub=USER with a token,  MAX_VUS   maximum number of connections (1000)
//             for an API that expects tokens
//
// Every other buyer sends an Idempotency-Key. Each 202 is printed as a JSON line with
// reservationId, userId, itemId and key. With `k6 run --log-format raw` the line has no prefix.

import { check } from 'k6';
import exec from 'k6/execution';
import { Counter } from 'k6/metrics';
import { checkAccepted, freshSale, journal, outcomeOf, reserve } from './lib/api.js';
import { RUN, arrivals, arrived, seconds, text, thresholds, whole } from './lib/settings.js';

const ITEM_ID = text('ITEM_ID');
const STOCK = whole('STOCK', 100);
const RATE = whole('RATE', 400);
const SECONDS = seconds('DURATION', '10s');
const DEMAND = RATE * SECONDS;

const accepted = new Counter('units_accepted');
const refused = new Counter('buyers_refused');

export const options = {
  scenarios: { stampede: arrivals(RATE, SECONDS) },
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
  const number = exec.scenario.iterationInTest;
  const userId = `${RUN}-${number}`;
  const key = number % 2 ? `order-${number}` : '';
  const response = reserve(userId, ITEM_ID, 1, key);
  const outcome = outcomeOf(response);
  if (outcome === 'accepted') {
    accepted.add(1);
    journal(response, key);
    checkAccepted(response, userId, ITEM_ID, 1);
  } else {
    refused.add(1);
    check(outcome, { 'a refusal is sold-out': () => outcome === 'sold-out' });
  }
}
