// A closed loop: each user asks for one unit of one item, again after each answer. Each user must
// get one unit, as long as there are units.
//
//   ITEM_ID   item without buyers, with maxPerUser 1 (required)
//   STOCK     units available at the start (100)
//   VUS       users (100)                       DURATION  such as 10s, 5m or 1h (10s)
//   API_URL, P95_MS                             as in stampede.js
//
// Many load tests have this shape, so their figures can be compared with those of this script. A
// closed loop flatters the server, because late answers reduce the load. stampede.js shows the time
// that buyers wait. The script prints the same journal as stampede.js.

import { check } from 'k6';
import { Counter } from 'k6/metrics';
import { checkAccepted, freshSale, journal, outcomeOf, reserve } from './lib/api.js';
import { seconds, text, thresholds, whole } from './lib/settings.js';

const ITEM_ID = text('ITEM_ID');
const STOCK = whole('STOCK', 100);
const VUS = whole('VUS', 100);
const SECONDS = seconds('DURATION', '10s');

const accepted = new Counter('units_accepted');
const refused = new Counter('requests_refused');

export const options = {
  scenarios: { closedLoop: { executor: 'constant-vus', vus: VUS, duration: `${SECONDS}s` } },
  thresholds: thresholds({ units_accepted: [`count==${Math.min(VUS, STOCK)}`] }),
};

export function setup() {
  freshSale(ITEM_ID, STOCK);
}

export default function () {
  const userId = `user_${__VU}`;
  const response = reserve(userId, ITEM_ID);
  const outcome = outcomeOf(response);
  if (outcome === 'accepted') {
    accepted.add(1);
    journal(response);
    checkAccepted(response, userId, ITEM_ID, 1);
  } else {
    refused.add(1);
    check(outcome, {
      'a refusal is limit-reached or sold-out': () =>
        outcome === 'limit-reached' || outcome === 'sold-out',
    });
  }
}
