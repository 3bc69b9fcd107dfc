// The API as the scripts see it: requests, what is counted of their answers, and the journal.

import { check } from 'k6';
import exec from 'k6/execution';
import http from 'k6/http';
import { Counter } from 'k6/metrics';
import { API_URL } from './settings.js';

const failures = new Counter('answers_5xx');
const silences = new Counter('answers_none');

// Refusals are answers too: only what a script does not expect is a failed request.
http.setResponseCallback(http.expectedStatuses({ min: 200, max: 499 }));

/** One POST /reserve: options for http.post and http.batch. */
export function wanted(userId, itemId, quantity, key) {
  const headers = { 'Content-Type': 'application/json' };
  if (key) headers['Idempotency-Key'] = key;
  return {
    method: 'POST',
    url: `${API_URL}/reserve`,
    body: JSON.stringify({ userId, itemId, quantity }),
    params: { headers, tags: { name: 'reserve' } },
  };
}

/** Sends it; see `outcomeOf`. */
export function reserve(userId, itemId, quantity = 1, key = '') {
  const { url, body, params } = wanted(userId, itemId, quantity, key);
  return http.post(url, body, params);
}

export function get(path, name) {
  return http.get(`${API_URL}${path}`, { tags: { name } });
}

/** `accepted`, or the last part of the problem's type; counts what is neither. */
export function outcomeOf(response) {
  let outcome;
  if (response.status === 0) {
    silences.add(1);
    outcome = 'no-answer';
  } else if (response.status === 202) {
    outcome = 'accepted';
  } else {
    if (response.status >= 500) failures.add(1);
    outcome = kindOf(response);
  }
  return outcome;
}

/** The last part of the problem's type, or the status of what is no problem. */
export function kindOf(response) {
  const type = String(response.headers['Content-Type']);
  if (!type.startsWith('application/problem+json')) return `status-${response.status}`;
  return response.json('type').split(':').pop();
}

/**
 * Writes an accepted reservation down, a JSON line each: what the crowd was promised, to be held
 * against the ledger.
 */
export function journal(response, key = '') {
  const { reservationId, userId, itemId } = response.json();
  console.log(JSON.stringify({ reservationId, userId, itemId, key }));
}

/** Whether a 202 is the reservation that was asked for. */
export function checkAccepted(response, userId, itemId, quantity) {
  const got = response.json();
  check(response, {
    'a 202 is what was asked for': () =>
      got.userId === userId && got.itemId === itemId && got.quantity === quantity,
    'a 202 says where it is': () =>
      response.headers.Location === `/sales/${itemId}/reservations/${got.reservationId}`,
  });
}

/** The sale; ends the run if there is none or if it does not have `available` units. */
export function freshSale(itemId, available) {
  const response = get(`/sales/${itemId}`, 'sale');
  if (response.status !== 200) {
    exec.test.abort(`GET /sales/${itemId} was answered ${response.status}: apply the sale first`);
  }
  const sale = response.json();
  if (sale.available !== available) {
    exec.test.abort(
      `${itemId} has ${sale.available} units available, STOCK is ${available}: ` +
        `apply a sale that has sold nothing yet, or set STOCK=${sale.available}`,
    );
  }
  return sale;
}
