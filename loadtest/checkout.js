// A checkout: buyers arrive at a constant rate for a sale with holds. Of those who get a unit, 70 %
// pay and are confirmed, 10 % are cancelled by the shop, and 20 % walk away. In the end every unit is
// confirmed, because each released unit is sold again.
//
//   ITEM_ID      item of a sale with holdSeconds (required)
//   ORDERS_URL   the order port (http://localhost:8083)
//   ORDER_TOKEN  a token of the order port, or two with a comma between them (required)
//   HOLD         holdSeconds of the sale, such as 3s, up to 24h (3s)
//   STOCK        units available at the start (100)
//   RATE         buyers per second (50)          DURATION  such as 10s, 5m or 1h (20s)
//   API_URL, P95_MS, RUN, TOKEN_URL, VUS, MAX_VUS as in stampede.js
//
// After DURATION come buyers who all pay, until the last hold of the others has expired. A buyer who
// is confirmed looks again after the hold would have expired. The script prints the same journal as
// stampede.js.

import { check, sleep } from 'k6';
import exec from 'k6/execution';
import { Counter } from 'k6/metrics';
import { change, orders } from './lib/orders.js';
import { checkAccepted, freshSale, get, journal, outcomeOf, reserve } from './lib/api.js';
import { RUN, arrivals, arrived, seconds, text, thresholds, whole } from './lib/settings.js';

const ITEM_ID = text('ITEM_ID');
const HOLD = seconds('HOLD', '3s');
if (HOLD > 86400) throw new Error(`HOLD must be at most 24h, not ${HOLD / 3600}h`);
const STOCK = whole('STOCK', 100);
const RATE = whole('RATE', 50);
const SECONDS = seconds('DURATION', '20s');
/** A hold, its grace, and the sweep that ends it. */
const EXPIRY = HOLD + Math.min(HOLD / 10, 30) + 3;
const REST = Math.ceil(EXPIRY) + Math.ceil((2 * STOCK) / RATE) + 5;
/** k6 ends a buyer 30 s after the scenario by default, which can be before the second look. */
const LOOKS_AGAIN = { gracefulStop: `${Math.ceil(EXPIRY) + 60}s` };

const confirmed = new Counter('units_confirmed');
const cancelled = new Counter('units_cancelled');
const left = new Counter('units_left');

export const options = {
  scenarios: {
    checkout: { ...arrivals(RATE, SECONDS), exec: 'checkout', ...LOOKS_AGAIN },
    rest: { ...arrivals(RATE, REST), exec: 'pay', startTime: `${SECONDS}s`, ...LOOKS_AGAIN },
    watch: { executor: 'constant-vus', vus: 1, duration: `${SECONDS + REST}s`, exec: 'watch' },
  },
  thresholds: thresholds({
    ...arrived(RATE * (SECONDS + REST)),
    units_confirmed: [`count==${STOCK}`],
  }),
};

export function setup() {
  freshSale(ITEM_ID, STOCK);
}

/** A buyer of whom it is not known whether the payment succeeds. */
export function checkout() {
  const reservation = buy('checkout');
  if (!reservation) return;
  const chance = Math.random();
  if (chance < 0.7) {
    confirm(reservation);
  } else if (chance < 0.8) {
    const answer = change(reservation, 'cancel', {});
    check(answer, { 'a cancellation is answered 200': () => answer.status === 200 });
    cancelled.add(1);
  } else {
    left.add(1);
  }
}

/** A buyer who pays. */
export function pay() {
  const reservation = buy('rest');
  if (reservation) confirm(reservation);
}

/** Look at the sale twice per second. */
export function watch() {
  const response = get(`/sales/${ITEM_ID}`, 'sale');
  const sale = response.status === 200 ? response.json() : {};
  check(response, {
    'confirmed and held units are within the stock': () =>
      sale.available >= 0 && sale.held >= 0 && sale.available + sale.held <= STOCK,
  });
  sleep(0.5);
}

export function teardown() {
  const sale = get(`/sales/${ITEM_ID}`, 'sale').json();
  check(sale, {
    'in the end every unit is confirmed': () => sale.available === 0 && sale.held === 0,
  });
}

function buy(scenario) {
  const number = exec.scenario.iterationInTest;
  const userId = `${RUN}-${scenario}-${number}`;
  const key = `order-${number}`;
  const response = reserve(userId, ITEM_ID, 1, key);
  const outcome = outcomeOf(response);
  if (outcome !== 'accepted') {
    check(outcome, { 'a refusal is sold-out': () => outcome === 'sold-out' });
    return null;
  }
  journal(response, key);
  checkAccepted(response, userId, ITEM_ID, 1);
  check(response, {
    'a 202 is held and says until when': () =>
      response.json('state') === 'held' && Date.parse(response.json('expiresAt')) > 0,
  });
  return response.json();
}

function confirm(reservation) {
  const orderRef = `${RUN}-${reservation.reservationId}`;
  const answer = change(reservation, 'confirm', { orderRef });
  const done = check(answer, {
    'a payment before the end of the hold is confirmed': () =>
      answer.status === 200 && answer.json('state') === 'confirmed',
  });
  if (!done) return;
  confirmed.add(1);
  sleep(EXPIRY);
  const later = orders(reservation);
  check(later, {
    'a confirmed reservation never expires': () =>
      later.status === 200 &&
      later.json('state') === 'confirmed' &&
      later.json('orderRef') === orderRef,
  });
}
