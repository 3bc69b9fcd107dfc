// A soak test: buyers arrive steadily for a long time, and the stock is large enough for all of
// them.
//
//   ITEM_ID   item (required)                 STOCK     units available at the start (1000000)
//   RATE      buyers per second (100)         DURATION  such as 10s, 5m or 1h (10m)
//   API_URL, P95_MS, RUN, TOKEN_URL, VUS, MAX_VUS as in stampede.js
//
// One in ten buyers reads the reservation, and another one in ten repeats the order. The script
// prints the same journal as stampede.js.

import { check } from 'k6';
import exec from 'k6/execution';
import { Counter } from 'k6/metrics';
import { checkAccepted, freshSale, get, journal, outcomeOf, reserve } from './lib/api.js';
import { RUN, arrivals, arrived, seconds, text, thresholds, whole } from './lib/settings.js';

const ITEM_ID = text('ITEM_ID');
const STOCK = whole('STOCK', 1000000);
const RATE = whole('RATE', 100);
const SECONDS = seconds('DURATION', '10m');

const accepted = new Counter('units_accepted');
const refused = new Counter('buyers_refused');

if (RATE * SECONDS > STOCK) {
  throw new Error(
    `${RATE * SECONDS} buyers will arrive, but STOCK is ${STOCK}: ` +
      `increase STOCK, or reduce RATE or DURATION`,
  );
}

export const options = {
  scenarios: { soak: arrivals(RATE, SECONDS) },
  thresholds: thresholds({
    ...arrived(RATE * SECONDS),
    units_accepted: ['count>0', `count<=${STOCK}`],
    buyers_refused: ['count==0'],
  }),
};

export function setup() {
  freshSale(ITEM_ID, STOCK);
}

export default function () {
  const number = exec.scenario.iterationInTest;
  const userId = `${RUN}-${number}`;
  const key = `order-${number}`;
  const response = reserve(userId, ITEM_ID, 1, key);
  if (outcomeOf(response) !== 'accepted') {
    refused.add(1);
    return;
  }
  accepted.add(1);
  journal(response, key);
  checkAccepted(response, userId, ITEM_ID, 1);
  const { reservationId } = response.json();
  if (number % 10 === 0) {
    const found = get(response.headers.Location, 'reservation');
    check(found, {
      'a reservation is at the Location of its 202': () =>
        found.status === 200 && found.json('reservationId') === reservationId,
    });
    const sale = get(`/sales/${ITEM_ID}`, 'sale');
    check(sale, {
      'a sale has between 0 and STOCK units available': () =>
        sale.status === 200 && sale.json('available') >= 0 && sale.json('available') <= STOCK,
    });
  }
  if (number % 10 === 5) {
    const again = reserve(userId, ITEM_ID, 1, key);
    check(again, {
      'a repeated order gets the same reservation': () =>
        outcomeOf(again) === 'accepted' && again.json('reservationId') === reservationId,
    });
  }
}
