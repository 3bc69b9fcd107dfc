// A smoke test: every answer of the API that a buyer can bring about, once.
//
// The answers 503 need a fault (Redis or Kafka away, a fenced sale): tests/ has those.
//
//   ITEM_ID   begins the items of four sales (required), none of which has sold anything:
//             $ITEM_ID           open, stock 3, maxPerUser 2
//             $ITEM_ID-later     not open yet
//             $ITEM_ID-ended     over
//             $ITEM_ID-paused    paused
//   API_URL   (http://localhost:8080)

import { check } from 'k6';
import http from 'k6/http';
import { freshSale, get, journal, kindOf, reserve } from './lib/api.js';
import { API_URL, text, thresholds } from './lib/settings.js';

const ITEM_ID = text('ITEM_ID');

export const options = { iterations: 1, thresholds: thresholds({}) };

export function setup() {
  freshSale(ITEM_ID, 3);
}

export default function () {
  const bought = reserve('ann', ITEM_ID, 1, 'order-1');
  is('accepted', bought, 202);
  const reservation = bought.json();
  check(reservation, {
    'a reservation says what it is': (r) =>
      r.userId === 'ann' && r.itemId === ITEM_ID && r.quantity === 1 && r.state === 'accepted',
  });
  const found = get(bought.headers.Location, 'reservation');
  is('a reservation', found, 200);
  check(found, { 'it is found where the 202 said': () => same(found.json(), reservation) });

  const again = reserve('ann', ITEM_ID, 1, 'order-1');
  is('the same order again', again, 202);
  check(again, { 'it is the same reservation': () => same(again.json(), reservation) });
  is('the key with another quantity', reserve('ann', ITEM_ID, 2, 'order-1'), 422, 'key-reused');
  is('more than one may have', reserve('ann', ITEM_ID, 2), 409, 'limit-reached');
  const second = reserve('bob', ITEM_ID, 1);
  is('accepted without a key', second, 202);
  is('more than is left', reserve('cid', ITEM_ID, 2), 409, 'not-enough-left');
  const third = reserve('cid', ITEM_ID, 1);
  is('the last one', third, 202);
  is('nothing is left', reserve('dan', ITEM_ID, 1), 409, 'sold-out');
  [bought, second, third].forEach((accepted) => journal(accepted));

  const later = reserve('ann', `${ITEM_ID}-later`);
  is('not open yet', later, 409, 'not-open');
  check(later, {
    'it says when it opens': () =>
      Date.parse(later.json('startsAt')) > Date.now() && Number(later.headers['Retry-After']) > 0,
  });
  is('over', reserve('ann', `${ITEM_ID}-ended`), 409, 'ended');
  is('paused', reserve('ann', `${ITEM_ID}-paused`), 409, 'paused');
  is('no such item', reserve('ann', `${ITEM_ID}-none`), 404, 'unknown-item');

  refusals();
  readings();
}

function refusals() {
  const good = { userId: 'eve', itemId: ITEM_ID, quantity: 1 };
  is('not JSON', post('{'), 400, 'malformed-json');
  is('not said to be JSON', post(JSON.stringify(good), 'text/plain'), 415, 'unsupported-media-type');
  is('too large', post(JSON.stringify({ ...good, more: 'x'.repeat(17000) })), 413, 'body-too-large');
  const wrong = [
    ...[-1, 0, 1001, 1.9, '2', null].map((quantity) => ['quantity', { ...good, quantity }]),
    ...['', 'x'.repeat(129), 'a b', null].map((userId) => ['userId', { ...good, userId }]),
    ...['', '*', 'flashsale:{x}:sale', null].map((itemId) => ['itemId', { ...good, itemId }]),
  ];
  for (const [field, body] of wrong) {
    const response = post(JSON.stringify(body));
    is(`a wrong ${field}`, response, 422, 'invalid-field');
    check(response, { 'it names the field': () => response.json('field') === field });
  }
  is('a wrong key', reserve('eve', ITEM_ID, 1, 'a b'), 422, 'invalid-field');
  const method = http.put(`${API_URL}/reserve`);
  is('another method', method, 405, 'method-not-allowed');
  check(method, { 'it says which': () => method.headers.Allow === 'POST' });
  is('no such path', get('/nothing', 'nothing'), 404, 'not-found');
}

function readings() {
  const sale = get(`/sales/${ITEM_ID}`, 'sale');
  is('a sale', sale, 200);
  is('all sales', get('/sales', 'sales'), 200);
  is('no such sale', get(`/sales/${ITEM_ID}-none`, 'sale'), 404, 'unknown-item');
  const none = `/sales/${ITEM_ID}/reservations/00000000-0000-7000-8000-000000000000`;
  is('no such reservation', get(none, 'reservation'), 404, 'unknown-reservation');
  is('healthz', get('/healthz', 'healthz'), 200);
  is('readyz', get('/readyz', 'readyz'), 200);
  is('the description', get('/openapi.json', 'openapi'), 200);
}

function post(body, type = 'application/json') {
  return http.post(`${API_URL}/reserve`, body, { headers: { 'Content-Type': type } });
}

function is(what, response, status, kind = '') {
  check(response, {
    [`${what}: ${status} ${kind}`]: () =>
      response.status === status && (!kind || kindOf(response) === kind),
  });
}

function same(one, other) {
  const names = Object.keys(one);
  return names.length === Object.keys(other).length && names.every((n) => one[n] === other[n]);
}
