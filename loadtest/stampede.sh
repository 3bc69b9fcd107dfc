#!/bin/sh
# A stampede in the cluster, on the sample sale: restocks it to 100 units to sell, runs
# loadtest/job.yaml and prints what k6 says. Fails if a threshold does. May be run again and again.
set -eu
cd "$(dirname "$0")/.."

kubectl wait --for=condition=Ready flashsale/iphone-15 --timeout=5m
accepted="$(kubectl get flashsale iphone-15 -o 'jsonpath={.status.accepted}')"
kubectl patch flashsale iphone-15 --type=merge -p "{\"spec\":{\"stock\":$((accepted + 100))}}"
kubectl wait --for='jsonpath={.status.available}=100' flashsale/iphone-15 --timeout=1m

kubectl create configmap loadtest --from-file=loadtest --from-file=loadtest/lib \
  --dry-run=client -o yaml | kubectl apply -f -
kubectl delete job loadtest --ignore-not-found
kubectl apply -f loadtest/job.yaml
kubectl wait --for='jsonpath={.status.ready}=1' job/loadtest --timeout=5m ||
  echo "it may have ended already"
kubectl logs --follow job/loadtest | grep -v '^{' # the journal of every 202
until conditions="$(kubectl get job loadtest -o 'jsonpath={.status.conditions[*].type}')" &&
  [ -n "$conditions" ]; do
  sleep 1
done
case "$conditions" in
  *Failed*) echo "the stampede failed: a threshold above says which rule" >&2; exit 1 ;;
esac
