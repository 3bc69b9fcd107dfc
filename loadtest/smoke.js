// A smoke test: every answer that a buyer of sales without holds can cause, once.
//
// A 503 needs a fault, such as an unavailable Redis or a fenced sale. The tests in tests/ cover it.
//
//   ITEM_ID   prefix of the items of four sales without reservations (required):
//             $ITEM_ID           open, with stock 3 and maxPerUser 2
//             $ITEM_ID-later     not open yet
//             $ITEM_ID-ended     ended
//             $ITEM_ID-paused    paused
//   API_URL   (http://localhost:8080)
//   TOKEN_URL as in stampede.js. It adds the answers of an API that expects tokens.

import { check } from 'k6';
import http from 'k6/http';
import {
  TOKEN_URL,
  freshSale,
  get,
  identityOf,
  journal,
  kindOf,
  reserve,
} from './lib/api.js';
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
    'a reservation matches its request': (r) =>
      r.userId === 'ann' && r.itemId === ITEM_ID && r.quantity === 1 && r.state === 'confirmed',
  });
  const found = get(bought.headers.Location, 'reservation');
  is('a reservation', found, 200);
  const { userId: _, ...anonymous } = reservation; // without tokens a stranger could read it, too
  const shown = TOKEN_URL ? reservation : anonymous;
  check(found, { 'the Location has the same reservation': () => same(found.json(), shown) });
  if (TOKEN_URL) tokens(bought.headers.Location);

  const again = reserve('ann', ITEM_ID, 1, 'order-1');
  is('a repeated order', again, 202);
  check(again, { 'it gets the same reservation': () => same(again.json(), reservation) });
  is('the key with another quantity', reserve('ann', ITEM_ID, 2, 'order-1'), 422, 'key-reused');
  is('more than maxPerUser', reserve('ann', ITEM_ID, 2), 409, 'limit-reached');
  const second = reserve('bob', ITEM_ID, 1);
  is('accepted without a key', second, 202);
  is('more units than are left', reserve('cid', ITEM_ID, 2), 409, 'not-enough-left');
  const third = reserve('cid', ITEM_ID, 1);
  is('the last unit', third, 202);
  is('no unit left', reserve('dan', ITEM_ID, 1), 409, 'sold-out');
  [bought, second, third].forEach((accepted) => journal(accepted));

  const later = reserve('ann', `${ITEM_ID}-later`);
  is('a sale that is not open yet', later, 409, 'not-open');
  check(later, {
    'the problem has the start': () =>
      Date.parse(later.json('startsAt')) > Date.now() && Number(later.headers['Retry-After']) > 0,
  });
  is('a sale that ended', reserve('ann', `${ITEM_ID}-ended`), 409, 'ended');
  is('a paused sale', reserve('ann', `${ITEM_ID}-paused`), 409, 'paused');
  is('an unknown item', reserve('ann', `${ITEM_ID}-none`), 404, 'unknown-item');

  invalidRequests();
  reads();
}

function tokens(place) {
  const order = JSON.stringify({ userId: 'ann', itemId: ITEM_ID, quantity: 1 });
  const anonymous = post(order, {});
  is('an order without a token', anonymous, 401, 'unauthorized');
  check(anonymous, {
    'the problem names the scheme': () => anonymous.headers['Www-Authenticate'] === 'Bearer',
  });
  const invalid = { Authorization: 'Bearer none' };
  is('an order with an invalid token', post(order, invalid), 401, 'unauthorized');
  is('an order for another user', post(order, identityOf('bob')), 403, 'wrong-user');
  is("another user's reservation", get(place, 'reservation'), 404, 'unknown-reservation');
  const read = http.get(`${API_URL}${place}`);
  is('a reservation without a token', read, 401, 'unauthorized');
}

function invalidRequests() {
  const good = { userId: 'eve', itemId: ITEM_ID, quantity: 1 };
  is('malformed JSON', post('{'), 400, 'malformed-json');
  const plain = post(JSON.stringify(good), identityOf('eve'), 'text/plain');
  is('another Content-Type', plain, 415, 'unsupported-media-type');
  const large = post(JSON.stringify({ ...good, more: 'x'.repeat(17000) }));
  is('a large body', large, 413, 'body-too-large');
  const wrong = [
    ...[-1, 0, 1001, 1.9, '2', null].map((quantity) => ['quantity', { ...good, quantity }]),
    ...['', 'x'.repeat(129), 'a b', null].map((userId) => ['userId', { ...good, userId }]),
    ...['', '*', 'flashsale:{x}:sale', null].map((itemId) => ['itemId', { ...good, itemId }]),
  ];
  for (const [field, body] of wrong) {
    const response = post(JSON.stringify(body));
    is(`an invalid ${field}`, response, 422, 'invalid-field');
    check(response, { 'the problem names the field': () => response.json('field') === field });
  }
  is('an invalid key', reserve('eve', ITEM_ID, 1, 'a b'), 422, 'invalid-field');
  const method = http.put(`${API_URL}/reserve`);
  is('another method', method, 405, 'method-not-allowed');
  check(method, { 'it has the allowed method': () => method.headers.Allow === 'POST' });
  is('an unknown path', get('/nothing', 'nothing'), 404, 'not-found');
}

function reads() {
  const sale = get(`/sales/${ITEM_ID}`, 'sale');
  is('a sale', sale, 200);
  is('all sales', get('/sales', 'sales'), 200);
  is('an unknown sale', get(`/sales/${ITEM_ID}-none`, 'sale'), 404, 'unknown-item');
  const none = `/sales/${ITEM_ID}/reservations/00000000-0000-7000-8000-000000000000`;
  is('an unknown reservation', get(none, 'reservation'), 404, 'unknown-reservation');
  is('healthz', get('/healthz', 'healthz'), 200);
  is('readyz', get('/readyz', 'readyz'), 200);
  is('the OpenAPI description', get('/openapi.json', 'openapi'), 200);
}

function post(body, identity = identityOf('eve'), type = 'application/json') {
  return http.post(`${API_URL}/reserve`, body, { headers: { 'Content-Type': type, ...identity } });
}

function is(name, response, status, kind = '') {
  check(response, {
    [`${name}: ${status} ${kind}`]: () =>
      response.status === status && (!kind || kindOf(response) === kind),
  });
}

function same(one, other) {
  const names = Object.keys(one);
  return names.length === Object.keys(other).length && names.every((n) => one[n] === other[n]);
}
