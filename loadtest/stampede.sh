#!/bin/sh
# Run a stampede on the sample sale in the cluster. The script restocks the sale to 100 available
# units, runs loadtest/job.yaml and prints k6's output. It fails if k6 crosses a threshold, and it
# can be run repeatedly.
set -eu
cd "$(dirname "$0")/.."

# A sale whose stock is below its sold units is not Ready until the restock. Applying the sample
# again after a stampede has this effect, so the script waits only for the reported units.
kubectl wait --for='jsonpath={.status.accepted}' flashsale/iphone-15 --timeout=5m
accepted="$(kubectl get flashsale iphone-15 -o 'jsonpath={.status.accepted}')"
kubectl patch flashsale iphone-15 --type=merge -p "{\"spec\":{\"stock\":$((accepted + 100))}}"
kubectl wait --for='jsonpath={.status.available}=100' flashsale/iphone-15 --timeout=1m

kubectl create configmap loadtest --from-file=loadtest --from-file=loadtest/lib \
  --dry-run=client -o yaml | kubectl apply -f -
kubectl delete job loadtest --ignore-not-found
kubectl apply -f loadtest/job.yaml
kubectl wait --for='jsonpath={.status.ready}=1' job/loadtest --timeout=5m ||
  echo "the job is not running; it may have ended already"
kubectl logs --follow job/loadtest | grep -v '^{' # hides the journal
# FailureTarget and SuccessCriteriaMet precede the two final conditions.
while :; do
  case "$(kubectl get job loadtest -o 'jsonpath={.status.conditions[*].type}')" in
    *Complete*) exit 0 ;;
    *Failed*) echo "the stampede failed: see the crossed thresholds above" >&2; exit 1 ;;
  esac
  sleep 1
done
