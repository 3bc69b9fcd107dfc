// Requests to the order port, as the shop's order service sends them.

import { sleep } from 'k6';
import http from 'k6/http';
import { text } from './settings.js';

const ORDERS_URL = (__ENV.ORDERS_URL || 'http://localhost:8083').replace(/\/$/, '');
const HEADERS = {
  Authorization: `Bearer ${text('ORDER_TOKEN').split(',')[0]}`,
  'Content-Type': 'application/json',
};
const TRIES = 30;

/** Read a reservation. */
export function orders(reservation) {
  return http.get(path(reservation), { headers: HEADERS, tags: { name: 'order' } });
}

/**
 * Confirm or cancel a reservation. Repeats the call while Kafka has not acknowledged it, or while
 * there is no decision.
 */
export function change(reservation, verb, body) {
  const url = `${path(reservation)}/${verb}`;
  const params = { headers: HEADERS, tags: { name: verb } };
  let answer = http.post(url, JSON.stringify(body), params);
  for (let n = 1; n < TRIES && repeats(answer.status); n += 1) {
    sleep(Number(answer.headers['Retry-After'] || 1));
    answer = http.post(url, JSON.stringify(body), params);
  }
  return answer;
}

function repeats(status) {
  return status === 0 || status === 202 || status >= 500;
}

function path({ itemId, reservationId }) {
  return `${ORDERS_URL}/sales/${itemId}/reservations/${reservationId}`;
}
